"""A sharded model whose layers a library changes: it is taken again, with its weights where they are.

The weights keep their layouts, and stay the objects that optimizers hold. New ones are whole until a program
uses them, which is planned around what is there and says how they are divided.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tpcompile.compile_program import Compiler
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import signature_of
from tpcompile.ir.layout.weight_layout import WeightLayout, whole_layout
from tpcompile.ir.module_tensors import whole_tensors
from tpcompile.ir.names import starred
from tpcompile.ranks.agree import compare, together
from tpcompile.ranks.compare_calls import compare_weights
from tpcompile.ranks.turns import own_turn
from tpcompile.strategies.read_rules import Rules
from tpcompile.weights.shard import shard_weights
from tpcompile.weights.sharded_parameter import ShardedParameter, local_tensor
from tpcompile.weights.sharded_weights import ShardedWeights

from .copy_model import as_original
from .generation import class_when_sharded
from .guards import divided_paths, guard_submodules, without_guards
from .runtime import Runtime
from .settings import Settings

T = TypeVar("T")


def take_again(model: nn.Module, what: str, change: Callable[[], T], around: nn.Module | None = None) -> T:
    """Changes layers of a sharded model; its next call captures another program. All ranks must call it.

    Args:
        model: the sharded model.
        what: is done, for errors.
        change: changes the model, which has its own classes then, and its sharded weights.
        around: a module that has the model in it afterwards, and becomes the sharded model instead of it.

    Returns:
        What ``change`` returns.

    Raises:
        TpCompileError: on all ranks: one has failed (there it is its own error), or new weights are unequal,
            or not on the model's device. The model is as it was, but for values written in place.
    """
    runtime: Runtime = model._tp  # type: ignore[assignment]
    group, root = runtime.compiler.group, model if around is None else around
    with own_turn(runtime.group_name):
        together(group, f"{what}: look at the model", lambda: _check(runtime, model, around is not None))
        with without_guards(model), as_original(model, runtime), ExitStack() as undo:
            before = _Before(model)
            undo.callback(before.restore)
            result = together(group, what, change)
            _check_new(runtime, model, before.new_tensors(root))
            undo.pop_all()
        _become(model, root, runtime, before)
    return result


class _Before:
    """What a model was.

    Attributes:
        paths: of its modules.
        names: of its parameters and buffers, by their identities.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = whole_tensors(model)
        self.paths = {path: module for path, module in model.named_modules()}
        self.names = {id(tensor): name for name, tensor in tensors.items()}
        self._held = list(tensors.values())  # alive, so that no other tensor gets its identity
        leaves = [local_tensor(p).data for p in model.parameters()]
        self._weights = [
            (p, p.requires_grad, leaf) for p, leaf in zip(model.parameters(), leaves, strict=True)
        ]
        tables: list[Any] = [module.__dict__ for module in self.paths.values()]
        tables += [v for table in tables for v in table.values() if isinstance(v, (dict, list, set))]
        self._content = [(t, dict(t) if isinstance(t, dict) else copy.copy(t)) for t in tables]

    def new_tensors(self, root: nn.Module) -> dict[str, Tensor]:
        """Those that were not there before, by name."""
        return {name: t for name, t in whole_tensors(root).items() if id(t) not in self.names}

    def moved(self, root: nn.Module) -> dict[str, str]:
        """Where its modules are now: by the old path the new one, of those that are there."""
        now = {module: path for path, module in root.named_modules()}
        return {path: now[module] for path, module in self.paths.items() if module in now}

    def restore(self) -> None:
        """Gives modules their attributes, parts and weights back, with what was in lists and dicts there."""
        for table, content in self._content:
            table.clear()
            (table.extend if isinstance(table, list) else table.update)(content)
        for parameter, trained, values in self._weights:
            parameter.requires_grad = trained
            local_tensor(parameter).data = values


def _check(runtime: Runtime, model: nn.Module, moved: bool) -> None:
    """Refuses models that cannot be taken again."""
    options = runtime.compiler.options
    why = ""
    if runtime.running or runtime.generating or runtime.lent:
        why = "it is in a call"
    elif runtime.foreign or any(isinstance(p, ShardedParameter) and p.averaged for p in model.parameters()):
        why = "fully_shard or DistributedDataParallel has its weights, and would not have new ones"
    elif options.custom:
        why = "custom strategies have divided modules of it"
    elif runtime.layout is None and (options.plan is not None or options.rules.wishes):
        why = "it has a plan that no call has carried out yet; call it once before, or model.capture(...)"
    elif moved and "forward" in model.__dict__:
        why = "its forward was replaced after parallelize"
    if why:
        raise TpCompileError(
            f"layers of a sharded model are to be changed, but {why}",
            where=type(model).__name__,
            todo="change the model before that, or before parallelize",
        )


def _check_new(runtime: Runtime, model: nn.Module, new: dict[str, Tensor]) -> None:
    """Refuses new weights that ranks would not take the same parts of."""
    group = runtime.compiler.group
    held = _weights(runtime, model)

    def check() -> None:
        for name, tensor in new.items():
            if tensor.device.type != held.axis.device_type:
                raise TpCompileError(
                    f"the mesh is for {held.axis.device_type}, a new weight is on {tensor.device}",
                    where=name,
                    todo=f"make it on {held.axis.device_type}, with values (low_cpu_mem_usage=False)",
                )
            if isinstance(tensor, ShardedParameter) and not _is_copy(tensor, held):
                raise TpCompileError(
                    "a new weight is a part already, of another model or divided otherwise",
                    where=name,
                    todo="give its full_tensor()",
                )

    together(group, "check new weights", check)
    whole = {n: t for n, t in new.items() if not isinstance(t, ShardedParameter)}
    parts = [f"{n}: {t.placing.text()}" for n, t in new.items() if isinstance(t, ShardedParameter)]
    compare(group, "copies of weights", parts, "change the model alike on every rank")
    compare_weights(group, whole)


def _is_copy(part: ShardedParameter, held: ShardedWeights) -> bool:
    """Whether a part is laid out as the weight that it says it is of; copies are."""
    if part.placing.name not in held.layout.params or part.placing.axis != held.axis:
        return False
    own = held.of(part.placing.name)
    return part.placing == own or (part.placing.whole and own.whole)


def _weights(runtime: Runtime, model: nn.Module) -> ShardedWeights:
    assert runtime.compiler.axis is not None, "a sharded model has a mesh"
    if runtime.layout is None:
        return ShardedWeights.undecided(model, runtime.compiler.axis)
    return runtime.weights()


def _become(model: nn.Module, root: nn.Module, runtime: Runtime, before: _Before) -> None:
    """Makes a sharded model of what a sharded model has become."""
    moved = before.moved(root)
    own = replace(
        runtime,
        compiler=_compiler(runtime.compiler, moved),
        layout=_layout(runtime.layout, root, before, moved),
        programs=[],
        composed=set(),
        settings=Settings(),
        hooks=[(moved[path], table, key) for path, table, key in runtime.hooks if path in moved],
        pieces=frozenset(),
        retyped=-1,
    )
    if root is not model:
        del model.__dict__["_tp"]
        model.__class__ = runtime.original
        if runtime.lifted is not None:
            model.__dict__["forward"] = runtime.lifted
        own.signature, own.original = signature_of(root), type(root)
        own.lifted = root.__dict__.pop("forward", None)
        root.__class__ = class_when_sharded(own.original)
    root._tp = own  # type: ignore[assignment]
    guard_submodules(root)
    weights, tensors = _weights(own, root), whole_tensors(root)
    parts = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, ShardedParameter)}
    for name, part in parts.items():
        part.placing = weights.of(name)  # which knows its name
    with torch.inference_mode(False):  # parts that could not be trained, even outside of the mode
        shard_weights(root, weights, tensors.keys() - parts.keys())
    if own.layout is not None:
        own.divided = divided_paths(root, own.layout)


def _layout(
    old: WeightLayout | None, root: nn.Module, before: _Before, moved: dict[str, str]
) -> WeightLayout | None:
    """Where all weights are: those that were there before where they were, copies of them there, too."""
    if old is None:
        return None
    params, undecided = {}, []
    for name, tensor in whole_tensors(root).items():
        was = before.names.get(id(tensor))
        if was is None and isinstance(tensor, ShardedParameter):
            was = tensor.placing.name
        if was is None or was in old.undecided:
            undecided.append(name)
        whole = whole_layout(name, tensor, len(old.axis_sizes))
        params[name] = whole if was is None else replace(old.params[was], name=name)
    return replace(old, params=params, undecided=tuple(undecided), split_groups=_groups(old, before, moved))


def _groups(old: WeightLayout, before: _Before, moved: dict[str, str]) -> tuple[str, ...]:
    """Which packed matmuls are held in segments: those of a module, and of what has taken its place."""
    found = {group for group in old.split_groups if group not in map(starred, before.paths)}
    for path in before.paths:
        if path and starred(path) in old.split_groups:
            above, _, name = path.rpartition(".")
            places = [moved[path]] if path in moved else []
            places += [f"{moved[above]}.{name}".lstrip(".")] if above in moved else []
            found |= set(map(starred, places))
    return tuple(sorted(found))


def _compiler(old: Compiler, moved: dict[str, str]) -> Compiler:
    """The compiler of what a model has become; what was asked of weights is done, under other names."""
    new, sequence = copy.copy(old), old.sequence
    if not isinstance(sequence, bool):
        sequence = frozenset(moved.get(path, path) for path in sequence)
    new.options = replace(old.options, plan=None, rules=Rules(), sequence=sequence)
    new.sequence = sequence
    return new

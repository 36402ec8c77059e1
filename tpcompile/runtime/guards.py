"""Submodules of a sharded model that are called on their own, as ``generate`` calls an encoder.

Their weights are this rank's slices, so that their own forward would compute something else. Each call of
one from outside of a program runs a program of its own over the same weights: the model, entered there.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import CallSignature, signature_of
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.weights.shard import local_weights

from .fixed_table import fix_tables, tell_functional_call
from .generates_alike import WithoutBatching
from .place import Root
from .replaced_forward import LIFTED, lift_forward
from .watched_module import ENTRY, WatchedModule, refuse_old_hooks

Hook = tuple[str, str, int]
"""Where a hook on a part is: the part's path, the table of hooks, its key there."""

_INSIDE = "_tp_inside"
"""The attribute of a module whose replaced forward runs as python."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Entry:
    """A place where a model can be called: itself (path ``""``), or one of its submodules.

    Attributes:
        path: the submodule's name.
        signature: that of its forward.
        original: its class before it was sharded.
    """

    path: str
    signature: CallSignature
    original: type[nn.Module]


@dataclass(frozen=True)
class _Guard:
    """What a guarded submodule knows.

    Attributes:
        entry: itself.
        root: the model that it belongs to.
    """

    entry: Entry
    root: nn.Module


class GuardedModule(WatchedModule):
    """Mixed into the class of a sharded model's submodule."""

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        raise TpCompileError(
            "a part of a sharded model cannot be copied: it holds slices, and its programs are the model's",
            where=self.__dict__[ENTRY].entry.path,
            todo="copy the whole model",
        )


@functools.cache
def guarded_class(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass whose forward runs a program if the module's weights are divided."""

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        guard: _Guard | None = self.__dict__.get(ENTRY)
        if guard is None:  # captured, by a forward that was set on the instance and calls what it replaces
            return original.forward(self, *args, **kwargs)
        runtime: Root = guard.root._tp  # type: ignore[assignment]
        if _INSIDE in self.__dict__:
            return _replaced(self, guard, runtime)(*args, **kwargs)
        if guard.entry.path in runtime.divided or guard.entry.path in runtime.pieces:
            return runtime.call(guard.root, args, kwargs, guard.entry)
        with local_weights(self):
            return _original(self, guard)(*args, **kwargs)

    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    body = {"forward": forward, "__module__": original.__module__, "__qualname__": original.__qualname__}
    batching = (WithoutBatching,) if hasattr(original, "generate_batch") else ()
    return type(original.__name__, (*batching, GuardedModule, original), body)


def _original(module: nn.Module, guard: _Guard) -> Callable[..., Any]:
    """A guarded module's own forward."""
    lifted = module.__dict__.get(LIFTED)
    if lifted is None:
        return functools.partial(guard.entry.original.forward, module)

    def run(*args: Any, **kwargs: Any) -> Any:
        module.__dict__[_INSIDE] = True
        try:
            return lifted(*args, **kwargs)
        finally:
            del module.__dict__[_INSIDE]

    return run


def _replaced(module: nn.Module, guard: _Guard, runtime: Root) -> Callable[..., Any]:
    """What a forward that was set on a part calls as the one that it replaces."""
    if guard.entry.path in runtime.divided:
        raise TpCompileError(
            "this part runs as python, and its replaced forward calls the one before, which needs a program",
            where=guard.entry.path,
            todo="replace it before parallelize",
        )
    return functools.partial(guard.entry.original.forward, module)


def original_call(
    root: nn.Module, forward: Callable[..., Any], path: str, signature: CallSignature, bound: dict[str, Any]
) -> Any:
    """Runs the python code of a module (``forward`` is the model's); its parts run programs of their own."""
    args, kwargs = signature.unbind(bound)
    module = root.get_submodule(path)
    with local_weights(module):
        if not path:
            return forward(*args, **kwargs)
        return _original(module, module.__dict__[ENTRY])(*args, **kwargs)


def guard_submodules(root: nn.Module) -> None:
    """Guards every submodule; the runtime says which of them have divided weights in them.

    One that is guarded already learns its place.
    """
    tell_functional_call()
    for path, module in list(root.named_modules()):
        if isinstance(module, torch.jit.ScriptModule):
            continue
        if (guard := module.__dict__.get(ENTRY)) is not None:
            module.__dict__[ENTRY] = _Guard(replace(guard.entry, path=path), root)
            continue
        fix_tables(module)
        if path:
            entry = Entry(path, signature_of(module), type(module))
            module.__dict__[ENTRY] = _Guard(entry, root)
            lift_forward(module)
            kind: Any = type(module)
            module.__class__ = guarded_class(kind)


def divided_paths(root: nn.Module, layout: WeightLayout) -> frozenset[str]:
    """The paths of all modules with a divided parameter or buffer in them; tied ones count everywhere."""
    found: set[str] = set()
    slices = _slices(root, layout)
    for path, module in root.named_modules(remove_duplicate=False):
        if any(id(t) in slices for t in (*module._parameters.values(), *module._buffers.values())):
            parts = path.split(".") if path else []
            found |= {".".join(parts[:i]) for i in range(len(parts) + 1)}
    return frozenset(found)


def _slices(root: nn.Module, layout: WeightLayout) -> set[int]:
    """The identities of all tensors of which this rank has a part."""
    divided = {name for name, param in layout.params.items() if not param.is_whole}
    return {id(t) for n, t in [*root.named_parameters(), *root.named_buffers()] if n in divided}


def open_paths(root: nn.Module, layout: WeightLayout | None) -> frozenset[str]:
    """The paths of all modules with matrices in them of which nobody has decided where they are."""
    found: set[str] = set()
    for name, param in root.named_parameters():
        if param.ndim > 1 and (layout is None or name in layout.undecided):
            parts = name.split(".")[:-1]
            found |= {".".join(parts[:i]) for i in range(1, len(parts) + 1)}
    return frozenset(found)


@contextmanager
def without_guards(root: nn.Module) -> Iterator[None]:
    """Gives submodules their own classes back, so that the model can be captured."""
    guards = [(m, type(m), m.__dict__[ENTRY]) for m in root.modules() if ENTRY in m.__dict__]
    for module, _, _ in guards:  # before anything is changed: it may be refused
        lift_forward(module)
    for module, _, guard in guards:
        del module.__dict__[ENTRY]
        module.__class__ = guard.entry.original
        if LIFTED in module.__dict__:
            module.__dict__["forward"] = module.__dict__.pop(LIFTED)
    try:
        yield
    finally:
        for module, kind, guard in guards:
            module.__dict__[ENTRY] = guard
            module.__class__ = kind
            lift_forward(module)


@contextmanager
def entered(root: nn.Module, path: str, lifted: Any = None) -> Iterator[None]:
    """Lets a call of the model be a call of one of its submodules, without the hooks of either.

    Args:
        root: the model. A forward that was set on it after it was sharded is not part of its programs.
        path: the submodule that is called.
        lifted: a forward that was set on the model before.

    A module's hooks run around the program, where the caller sees them; traced, they would run again inside.
    """
    module = root.get_submodule(path)
    hooks = [(m.__dict__, {name: m.__dict__[name] for name in _HOOKS}) for m in {root, module}]
    own_class, outer = type(root), root.__dict__.pop("forward", None)
    if lifted is not None and not path:
        root.__dict__["forward"] = lifted
    for own, tables in hooks:
        own.update({name: OrderedDict() for name in tables})
    if path:
        root.__class__ = _entered_class(own_class, type(module), path)
    try:
        yield
    finally:
        root.__class__ = own_class
        root.__dict__.pop("forward", None)
        if outer is not None:
            root.__dict__["forward"] = outer
        for own, tables in hooks:
            own.update(tables)


def backward_hooks(root: nn.Module) -> list[Hook]:
    """The backward hooks on the parts of a model: a captured graph has no place for them.

    Raises:
        TpCompileError: there is one that sees steps of autograd.
    """
    for path, module in root.named_modules():
        if module._backward_hooks and not module._is_full_backward_hook:
            refuse_old_hooks(path or type(root).__name__)
    return [
        (path, table, key)
        for path, module in root.named_modules()
        for table in ("_backward_hooks", "_backward_pre_hooks")
        for key in module.__dict__[table]
        if path
    ]


def _on_all_modules() -> Iterator[tuple[dict[int, Any], int]]:
    """The forward hooks that somebody has registered for all modules: their tables and keys there."""
    for table in (nn_module._global_forward_hooks, nn_module._global_forward_pre_hooks):
        for key, hook in table.items():
            if not getattr(hook, "__module__", "").startswith("torch."):  # a FLOP counter only looks
                yield table, key


def hooks_below(root: nn.Module, path: str, hooks: list[Hook]) -> bool:
    """Whether hooks are there on modules inside of the one at ``path``."""
    if any(_on_all_modules()) and any(root.get_submodule(path).children()):
        return True
    return any(
        (not path or place.startswith(path + ".")) and key in root.get_submodule(place).__dict__[table]
        for place, table, key in hooks
    )


@contextmanager
def without_hooks(root: nn.Module, hooks: list[Hook]) -> Iterator[None]:
    """Takes away hooks: they run where the caller sees them, and are not part of what is captured."""
    places = [(root.get_submodule(path).__dict__[table], key) for path, table, key in hooks]
    places += _on_all_modules()
    before = [(table, list(table.items())) for table, _ in places]
    for table, key in places:
        table.pop(key, None)
    try:
        yield
    finally:
        for table, items in before:
            table.clear()
            table.update(items)


def _entered_class(root: type[nn.Module], entry: type[nn.Module], path: str) -> type[nn.Module]:
    @functools.wraps(entry.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return nn.Module.__call__(self.get_submodule(path), *args, **kwargs)

    # The name is part of what captures on disk are found by.
    body = {"forward": forward, "__module__": root.__module__, "__qualname__": f"{root.__qualname__}:{path}"}
    return cast(type[nn.Module], type(root.__name__, (root,), body))

"""A sharded model at work: its programs, its weights, and how a call finds its program."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules import module as nn_module

from tpcompile.capture.caches.layers import is_count
from tpcompile.capture.divide_caches import divide_caches, whole_caches
from tpcompile.capture.held_caches import Held
from tpcompile.compile_program import Compiled, Compiler
from tpcompile.errors import CannotCapture, OnlyInParts, RanksApart, TpCompileError
from tpcompile.ir.calls import CallSignature, flatten_call, leaf_names
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.module_tensors import tensors_by_name, whole_tensors
from tpcompile.ir.torch_internals import TreeSpec, peek_interpreter_stack
from tpcompile.ranks.compare_calls import can_compare, compare_call, compare_weights
from tpcompile.ranks.lost_ranks import is_loss, lost
from tpcompile.ranks.turns import begin_turn
from tpcompile.strategies.custom.custom_modules import CustomModules
from tpcompile.weights.shard import shard_weights, unsharded
from tpcompile.weights.sharded_parameter import ShardedParameter, local_tensor
from tpcompile.weights.sharded_weights import ShardedWeights

from .guards import (
    Entry,
    Hook,
    divided_paths,
    entered,
    hooks_below,
    open_paths,
    original_call,
    without_guards,
    without_hooks,
)
from .make_program import hand_out, make_program
from .program import Program, autocast_of, device_of
from .python_values import forget_values, open_numbers
from .settings import Settings
from .watched_module import ENTRY

_MOST_STATES = 4


@dataclass
class Runtime:
    """Everything that a sharded module knows beyond the original one.

    Attributes:
        compiler: makes programs for this model on this mesh.
        signature: the original forward's.
        original: the original class of the module.
        layout: where the weights lie; None until the first program decides it.
        programs: one per call signature.
        caches: how tensors lie that programs handed out to be given back, by name.
        divided: the paths of modules with divided weights in them.
        composed: the modules, with the arguments given, that run as python over their parts.
        pieces: the paths of modules that get programs under them although nothing of them is divided yet.
        compile_options: torch.compile's for every program, or None to run them as they are.
        compare_calls: compare every call over the ranks, not only a program's first one.
        lifted: a forward that was set on the model before it was sharded.
        hooks: hooks on submodules that no program has in it.
        custom: the modules of custom strategies.
        foreign: whether another library (FSDP) has made something else of the parameters.
        steering: the streamer and the user's logits processors of the generation that runs.
        running: how many calls are being worked on: what the model's own code changes is no new setting.
    """

    compiler: Compiler
    signature: CallSignature
    original: type[nn.Module]
    settings: Settings = field(default_factory=Settings)
    layout: WeightLayout | None = None
    programs: list[Program] = field(default_factory=list)
    caches: dict[str, Held] = field(default_factory=dict)
    divided: frozenset[str] = frozenset()
    composed: set[tuple[str, tuple[str, ...]]] = field(default_factory=set)
    pieces: frozenset[str] = frozenset()
    compile_options: dict[str, Any] | None = None
    compare_calls: bool = False
    lifted: Any = None
    hooks: list[Hook] = field(default_factory=list)
    steering: tuple[Any, Sequence[Any]] = (None, ())
    running: int = 0
    custom: CustomModules = field(default_factory=CustomModules)
    foreign: bool = False

    def call(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], entry: Entry | None = None
    ) -> Any:
        """Runs a call of the model, or of a submodule, on its program, captured if there is none.

        Raises:
            TpCompileError: the call cannot be captured, or another thread is in one.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._call(model, args, kwargs, entry)
        turn = begin_turn(self.group_name)
        try:
            return self._call(model, args, kwargs, entry)
        finally:
            turn.release()

    def _call(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], entry: Entry | None
    ) -> Any:
        bound = self.bind(args, kwargs, entry)
        path = entry.path if entry is not None else ""
        leaves, spec = flatten_call(bound)
        if not torch.compiler.is_dynamo_compiling():
            _refuse_transforms()
        self._check_devices(bound, leaves)
        if self.compare_calls and not self.running and can_compare(leaves):
            self._compare(model, bound, path, leaves)
        if self.hooks and hooks_below(model, path, self.hooks):
            if self.layout is None:
                self.capture(model, bound, path)  # so that all parts are planned together
            return self._run_parts(model, bound, path, entry)
        names, training = tuple(bound), model.get_submodule(path).training
        program = self.find(names, leaves, spec, training, path)
        if program is None:
            if (path, names) not in self.composed:
                answer = _capture_and_run(self, model, bound, path)
                if answer is not NotImplemented:
                    return answer
                return self._try_parts(model, bound, path, entry)
            return self._run_parts(model, bound, path, entry)
        if not torch.compiler.is_dynamo_compiling():
            self._compare_first(program, model, bound, leaves)
        if program.autocast is None:
            return self.run(program, leaves, bound)
        with torch.autocast(device_of(leaves), enabled=False):
            return self.run(program, leaves, bound)

    @property
    def group_name(self) -> str:
        """What tells the ranks of this model from others."""
        return "" if self.compiler.axis is None else self.compiler.axis.group_name

    def run(self, program: Program, leaves: Sequence[Any], bound: dict[str, Any]) -> Any:
        """Runs a program.

        Raises:
            RanksApart: a rank does not take part in it, or is gone.
        """
        if torch.compiler.is_dynamo_compiling():
            return program.run(leaves, bound, self.compile_options)
        try:
            return program.run(leaves, bound, self.compile_options)
        except RuntimeError as error:
            if not isinstance(error, RanksApart) and not is_loss(error):
                raise
            axis = self.compiler.axis
            assert axis is not None, "a sharded model has a mesh"
            apart = error if isinstance(error, RanksApart) else lost(axis.group, f"run {program}", error)
            raise RanksApart(
                apart.what, where=f"the program {program}; {apart.where}", todo=apart.todo
            ) from error

    def find(
        self, names: tuple[str, ...], leaves: Sequence[Any], spec: TreeSpec, training: bool, path: str = ""
    ) -> Program | None:
        """The program of a call, of the model or of the submodule at ``path``, if it was captured."""
        for program in self.programs:
            if program.entry == path and program.types == self.settings.types:
                fits = program.fits(names, leaves, training) and program.captured.in_spec == spec
                if fits and program.reads.hold(self.settings.state):
                    return program
        return None

    def _run_parts(self, model: nn.Module, bound: dict[str, Any], path: str, entry: Entry | None) -> Any:
        """Runs the python code of a module; what its parts do to themselves changes no settings."""
        self.running += 1
        try:
            forward = self.lifted or functools.partial(self.original.forward, model)
            return original_call(model, forward, path, (entry or self).signature, bound)
        finally:
            self.running -= 1

    def _try_parts(self, model: nn.Module, bound: dict[str, Any], path: str, entry: Entry | None) -> Any:
        """As ``_run_parts``, for a first time: if python fails as well, the call is wrong, not the model."""
        try:
            return self._run_parts(model, bound, path, entry)
        except Exception:
            self.composed.discard((path, tuple(bound)))
            self._note_composed(model)
            raise

    def _note_composed(self, model: nn.Module) -> None:
        """Notes what follows from what runs as python: which modules get programs, what stays whole."""
        self.pieces = open_paths(model, self.layout) if self.composed else frozenset()

    def _check_devices(self, bound: dict[str, Any], leaves: Sequence[Any]) -> None:
        axis = self.compiler.axis
        for at, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and axis is not None and leaf.device.type != axis.device_type:
                name = leaf_names(bound)[at]
                if is_count(name):  # a tensor without elements
                    continue
                raise TpCompileError(
                    f"the mesh is for {axis.device_type}, {name} is on {leaf.device}",
                    where="the call",
                    todo=f"move it to {axis.device_type}",
                )

    def _compare_first(
        self, program: Program, model: nn.Module, bound: dict[str, Any], leaves: Sequence[Any]
    ) -> None:
        """Compares a program's first call over the ranks, unless all calls are compared anyway."""
        if not program.seen and can_compare(leaves):
            program.seen = True
            if not self.compare_calls:
                self._compare(model, bound, program.entry, leaves)

    def _compare(
        self,
        model: nn.Module,
        bound: dict[str, Any],
        path: str,
        leaves: Sequence[Any],
        act: str = "run",
    ) -> None:
        """Compares a call that ranks are to run or to capture; the parts of caches differ."""
        mode = "train" if model.get_submodule(path).training else "eval"
        modes = f"gradients {torch.is_grad_enabled()}, autocast {autocast_of(leaves)}"
        what = f"{path or type(model).__name__} in {mode} mode, {modes}"
        named = [(n, x) for n, x in zip(leaf_names(bound), leaves, strict=True) if n not in self.caches]
        names, values = [n for n, _ in named], [x for _, x in named]
        compare_call(self.compiler.group, act, what, names, values)

    def bind(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], entry: Entry | None = None
    ) -> dict[str, Any]:
        """The call as keyword arguments in the order of the signature."""
        try:
            return (entry or self).signature.bind(args, kwargs)
        except ValueError as error:
            raise TpCompileError(
                f"the call does not fit the model's forward, which {error}",
                where=f"{(entry or self).original.__name__}.forward",
                todo="give the arguments as you would call the model",
            ) from None

    def capture(self, model: nn.Module, bound: dict[str, Any], path: str = "") -> Program:
        """Compiles a program for a call; the first one also decides where the weights lie.

        Args:
            model: the sharded model.
            bound: the call.
            path: the submodule that is called, "" for the model itself.

        Raises:
            TpCompileError: the call cannot be captured, planned or lowered; the model is unchanged.
        """
        if can_compare(leaves := flatten_call(bound)[0]):
            self._compare(model, bound, path, leaves, "capture")
        if self.compiler.options.dynamic is False:
            self._refuse_new_shapes(bound, path)
        else:
            bound = open_numbers(self.programs, bound, path)
        self._refuse_counting(tuple(bound), path)
        if self.layout is None:
            tensors = {name: local_tensor(t) for name, t in whole_tensors(model).items()}
            compare_weights(self.compiler.group, tensors)
        self._follow_types(model)
        self._keep_whole(model)
        with (
            unsharded(model, self.original),
            without_guards(model),
            without_hooks(model, self.hooks),
            entered(model, path, self.lifted),
            saved_tensors_hooks(_itself, _itself),  # activation checkpointing would count what is traced
        ):
            compiled = self.compiler.compile(
                model, whole_caches(bound, self.caches), self.layout, self.caches
            )
        self.caches = {**hand_out(compiled.planned), **self.caches}
        with torch.inference_mode(False):  # slices that could not be trained, even outside of the mode
            self.layout = self._divide(model, compiled)
        self.divided = divided_paths(model, self.layout)
        self._note_composed(model)
        program = make_program(
            model, compiled, bound, path, self.compiler.rank, self.settings, self.original_of(model)
        )
        if self.foreign:
            program.bind(False)
        self.settings.read |= program.captured.reads
        self.programs.append(program)
        if (note := forget_values(self.programs, bound)) and self.compiler.rank == 0:
            warnings.warn(note, stacklevel=2)
        return program

    def _keep_whole(self, model: nn.Module) -> None:
        """Sees to it that no program divides what python has read."""
        named = model.named_parameters()
        read = frozenset(name for name, p in named if isinstance(p, ShardedParameter) and p.read)
        self.compiler.whole = read
        if self.layout is not None:
            kept = tuple(name for name in self.layout.undecided if name not in read)
            self.layout = replace(self.layout, undecided=kept)

    def _divide(self, model: nn.Module, compiled: Compiled) -> WeightLayout:
        """Cuts the parameters of which a program has decided how they lie; how they lie from now on."""
        layout = compiled.plan.layout
        decided = None if self.layout is None else set(self.layout.undecided) - set(layout.undecided)
        self.custom = compiled.planned.custom
        shard_weights(model, self.weights(layout), decided)
        return layout

    def weights(self, layout: WeightLayout | None = None) -> ShardedWeights:
        """What gathers, loads and saves the weights needs to know."""
        layout = layout or self.layout
        assert self.compiler.axis is not None and layout is not None, (
            "a sharded model has a mesh and a layout"
        )
        return ShardedWeights(layout, self.compiler.axis, self.custom)

    def mark_weights(self, model: nn.Module) -> None:
        """Makes parameters of which nothing is decided yet what they will be: optimizers may be made now."""
        if self.layout is None and self.compiler.axis is not None:
            shard_weights(model, ShardedWeights.undecided(model, self.compiler.axis))

    def rebind(self, foreign: bool = False) -> None:
        """Takes note that weights are other tensors than before, or no sharded parameters any more."""
        if not self.foreign:
            self.foreign = foreign
            for program in self.programs:
                program.bind(not foreign)

    def original_of(self, model: nn.Module) -> Callable[[str], type[nn.Module]]:
        """What gives the original class of a module of the model, by its path."""

        def original(path: str) -> type[nn.Module]:
            module = model.get_submodule(path)
            guard = module.__dict__.get(ENTRY)
            return guard.entry.original if guard is not None else self.original if not path else type(module)

        return original

    def try_first(
        self, model: nn.Module, bound: dict[str, Any], *, optional: bool = False
    ) -> TpCompileError | None:
        """Captures a call; returns why it cannot be captured if its parts are to be captured instead.

        Args:
            model: the model.
            bound: the call.
            optional: nobody asked for the call: it need not be one that can be captured.

        Raises:
            TpCompileError: it is refused for another reason, or is not to be composed.
        """
        try:
            self.capture(model, bound)
        except TpCompileError as error:
            if not self._wants_parts(error, True if optional else self.compiler.options.compose):
                raise
            return error
        return None

    def compose(self, model: nn.Module, path: str, names: tuple[str, ...], error: TpCompileError) -> bool:
        """Whether a call that could not be captured runs as python over the module's parts from now on."""
        wanted = self._wants_parts(error, self.compiler.options.compose)
        if not wanted:
            return False
        self.composed.add((path, names))
        self._note_composed(model)
        where = f"{path or type(model).__name__}({', '.join(names)})"
        warnings.warn(
            f"{where} runs as python over parts that are captured by themselves, because it cannot be "
            f"captured as a whole: {error}",
            stacklevel=2,
        )
        return True

    @staticmethod
    def _wants_parts(error: TpCompileError, asked: bool | None) -> bool:
        """Whether an error, of this rank or of another, says that parts are to be captured instead."""
        kinds = {True: (CannotCapture, OnlyInParts), None: (OnlyInParts,), False: ()}[asked]
        return any(isinstance(error, kind) or kind.__name__ in error.what for kind in kinds)

    def _follow_types(self, model: nn.Module) -> None:
        """Takes note of ``model.to(dtype)``.

        Raises:
            TpCompileError: the weights have left the mesh's device.
        """
        axis = self.compiler.axis
        if self.layout is None or axis is None:
            return
        params = dict(self.layout.params)
        for name, (module, attribute) in tensors_by_name(model).items():
            tensor = getattr(module, attribute)
            if name in params and tensor.device.type not in (axis.device_type, "meta"):
                raise TpCompileError(
                    f"the mesh is for {axis.device_type}, a weight is on {tensor.device}",
                    where=name,
                    todo=f"move the model back to {axis.device_type}",
                )
            if name in params and params[name].dtype != tensor.dtype:
                params[name] = replace(params[name], dtype=tensor.dtype)
        self.layout = replace(self.layout, params=params)

    def _refuse_counting(self, names: tuple[str, ...], path: str) -> None:
        """Refuses a call that leaves another python state each time, so that each wants its own program."""
        found = [p.counted for p in self.programs if (p.entry, p.names) == (path, names) and p.counted]
        if len(found) >= _MOST_STATES:
            raise TpCompileError(
                f"forward changes {found[-1]} at every call, and depends on it: {len(found)} of its values "
                "have programs already",
                where=path or self.original.__name__,
                todo="let it be a buffer, a tensor that forward changes in place; or keep it out of forward",
            )

    def _refuse_new_shapes(self, bound: dict[str, Any], path: str) -> None:
        leaves, _ = flatten_call(bound)
        for program in self.programs:
            same = program.names == tuple(bound) and len(leaves) == len(program.example)
            if same and program.entry == path and (why := program.captured.accepts(leaves)) is not None:
                raise TpCompileError(
                    f"the call has other shapes than the program was captured for: {why}",
                    where="the call",
                    todo="parallelize with dynamic=True, or keep to the captured shapes",
                )


def _refuse_transforms() -> None:
    """Refuses what does not see through programs: forward-mode derivatives would be zeros."""
    if nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks:
        raise TpCompileError(
            "there are backward hooks on all modules, which the parts inside of a program would not run",
            where="the call",
            todo="register them on the modules that they are for",
        )
    transformed = peek_interpreter_stack() is not None
    if transformed or forward_ad._current_level >= 0:
        raise TpCompileError(
            "torch.func and forward-mode derivatives do not see through the collectives of a sharded model",
            where="the call",
            todo="use backward, or torch.autograd.grad",
        )


def _itself(tensor: Tensor) -> Tensor:
    return tensor


# Under torch.compile(fullgraph=True) the reason is the error; without fullgraph the graph breaks here.
@torch.compiler.disable(reason="no program was captured for this call: call model.capture(...) with it first")
def _capture_and_run(runtime: Runtime, model: nn.Module, bound: dict[str, Any], path: str) -> Any:
    if runtime.layout is not None and runtime.caches:
        divide_caches(bound, runtime.caches, runtime.layout, runtime.compiler.rank)
    leaves, spec = flatten_call(bound)
    training = model.get_submodule(path).training
    program = runtime.find(tuple(bound), leaves, spec, training, path)
    if program is None:
        try:
            program = runtime.capture(model, bound, path)
            program.seen = True
        except TpCompileError as error:
            empty = not path and not any(isinstance(leaf, Tensor) for leaf in leaves)
            if empty or not runtime.compose(model, path, tuple(bound), error):
                raise
            return NotImplemented
    runtime._compare_first(program, model, bound, leaves)
    with torch.autocast(device_of(leaves), enabled=False):
        return runtime.run(program, leaves, bound)

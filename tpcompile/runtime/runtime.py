"""A sharded model at work: how a call finds its program, or gets one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor
from torch.nn.modules import module as nn_module

from tpcompile.capture.caches.layers import is_count
from tpcompile.capture.divide_caches import divide_caches
from tpcompile.errors import RanksApart, TpCompileError
from tpcompile.ir.calls import flatten_call, leaf_names, sizes_of_call
from tpcompile.ir.torch_internals import TreeSpec, get_tracing_state, peek_interpreter_stack
from tpcompile.ranks.agree import compare
from tpcompile.ranks.compare_calls import MOST_SIZES, can_compare, compare_sizes
from tpcompile.ranks.compare_order import compare_order
from tpcompile.ranks.lost_ranks import is_loss, lost
from tpcompile.ranks.turns import own_turn
from tpcompile.weights.sharded_parameter import ShardedParameter

from .add_program import add_program
from .guards import Entry, hooks_below
from .last_call import last_call
from .parts import compose_call, run_parts, try_parts
from .program import RankProgram, device_of
from .state import State

_NO_PROGRAM = "no program was captured for this call: call model.capture(...) with it first"


class Runtime(State):
    """The state of a sharded model, and what its calls do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Under torch.compile(fullgraph=True) the reason is the error; otherwise the graph breaks here.
        self._capture_and_run = torch.compiler.disable(_capture_and_run, reason=_NO_PROGRAM)

    def call(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], entry: Entry | None = None
    ) -> Any:
        """Runs a call of the model, or of a submodule, on its program, captured if there is none.

        Raises:
            TpCompileError: the call cannot be captured, or another thread is in one.
        """
        if torch.compiler.is_dynamo_compiling():
            return self._call(model, args, kwargs, entry)
        if self.leader is not None:
            with self.leader.announced("__call__", args, kwargs, "" if entry is None else entry.path):
                return self._in_turn(model, args, kwargs, entry)
        return self._in_turn(model, args, kwargs, entry)

    def _in_turn(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], entry: Entry | None
    ) -> Any:
        with own_turn(self.group_name):
            again = self._again(model, args, kwargs, "" if entry is None else entry.path)
            return self._call(model, args, kwargs, entry) if again is None else self._run_uncast(*again)

    def _again(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], path: str
    ) -> tuple[RankProgram, Sequence[Any], dict[str, Any]] | None:
        """A call that equals the last one but for values and sizes, and its program; None: look for it."""
        last = self.last.get(path)
        if last is None or self.compare_calls or hooks_below(model, path, self.hooks):
            return None
        if (call := last.read(args, kwargs)) is None:
            return None
        (bound, leaves), program = call, last.program
        if self._is_new(program, leaves):
            return None
        _refuse_transforms()
        self.note_types(model)
        training = model.get_submodule(path).training
        if any(self._is_for(p, leaves, training) for p in last.rivals):
            return None
        return (program, leaves, bound) if self._is_for(program, leaves, training) else None

    def _is_for(self, program: RankProgram, leaves: Sequence[Any], training: bool) -> bool:
        """Whether a program is a call's whose structure and leaves are like its."""
        if program.types != self.settings.types or not program.fits_now(leaves, training):
            return False
        return program.reads.hold(self.settings.state)

    def _call(
        self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], entry: Entry | None
    ) -> Any:
        bound = self.bind(args, kwargs, entry)
        path = entry.path if entry is not None else ""
        leaves, spec = flatten_call(bound)
        if not torch.compiler.is_dynamo_compiling():
            _refuse_transforms()
            self.note_types(model)
        self._check_tensors(bound, leaves)
        if self.compare_calls and not self.running and can_compare(leaves):
            self.compare(model, bound, path, leaves)
        if hooks_below(model, path, self.hooks):
            if self.layout is None:
                add_program(self, model, bound, path)  # so that all parts are planned together
            return run_parts(self, model, bound, path, entry)
        names, training = tuple(bound), model.get_submodule(path).training
        program = self.find(names, leaves, spec, training, path)
        if program is None or (self.lent and torch.compiler.is_dynamo_compiling()):
            if (path, names) not in self.composed:
                answer = self._capture_and_run(self, model, bound, path)
                if answer is not NotImplemented:
                    return answer
                return try_parts(self, model, bound, path, entry)
            return run_parts(self, model, bound, path, entry)
        if not torch.compiler.is_dynamo_compiling():
            self._compare_first(program, model, bound, leaves)
            self._note_call(program, (args, kwargs), entry, bound, leaves, spec)
        return self._run_uncast(program, leaves, bound)

    def _note_call(
        self,
        program: RankProgram,
        call: tuple[Sequence[Any], Mapping[str, Any]],
        entry: Entry | None,
        bound: dict[str, Any],
        leaves: Sequence[Any],
        spec: TreeSpec,
    ) -> None:
        """Has calls like this one know their program, once a program was found twice in a row."""
        if self.found is program:
            earlier = self.programs[: next(i for i, p in enumerate(self.programs) if p is program)]
            signature = (entry or self).signature
            if (last := last_call(program, earlier, signature, call, bound, leaves, spec)) is not None:
                self.last[program.entry] = last
        self.found = program

    def _run_uncast(self, program: RankProgram, leaves: Sequence[Any], bound: dict[str, Any]) -> Any:
        """Runs a program, which has the casts of its autocast mode in it."""
        if program.autocast is None:
            return self.run(program, leaves, bound)
        with torch.autocast(device_of(leaves), enabled=False):
            return self.run(program, leaves, bound)

    def run(self, program: RankProgram, leaves: Sequence[Any], bound: dict[str, Any]) -> Any:
        """Runs a program.

        Raises:
            RanksApart: a rank does not take part in it, or is gone.
            TpCompileError: ranks have run programs in different orders.
        """
        if torch.compiler.is_dynamo_compiling():
            return program.run(leaves, bound, self.compile_options)
        axis = self.compiler.axis
        if axis is not None and program.plan.collectives:
            self._compare_order(axis.group, program, leaves, bound)
        try:
            return program.run(leaves, bound, None if self.lent else self.compile_options)
        except RuntimeError as error:
            if not isinstance(error, RanksApart) and not is_loss(error):
                raise
            assert axis is not None, "a sharded model has a mesh"
            apart = error if isinstance(error, RanksApart) else lost(axis.group, f"run {program}", error)
            raise RanksApart(
                apart.what, where=f"the program {program}; {apart.where}", todo=apart.todo
            ) from error

    def _check_tensors(self, bound: dict[str, Any], leaves: Sequence[Any]) -> None:
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
            if isinstance(leaf, DTensor) and not isinstance(leaf, ShardedParameter):
                raise TpCompileError(
                    f"the argument {leaf_names(bound)[at]} is a DTensor: programs take whole plain tensors",
                    where="the call",
                    todo="give its full_tensor()",
                )

    def _compare_first(
        self, program: RankProgram, model: nn.Module, bound: dict[str, Any], leaves: Sequence[Any]
    ) -> None:
        """Compares calls of sizes that a program has not seen, unless all calls are compared anyway."""
        if self.compare_calls or not self._is_new(program, leaves) or not can_compare(leaves):
            return
        if len(program.seen) < MOST_SIZES:
            self.compare(model, bound, program.entry, leaves)
        else:
            named = leaf_names(bound)
            whole = [named[at] for at in program.loose], [leaves[at] for at in program.loose]
            compare_sizes(self.compiler.group, str(program), *whole)
        program.seen.add(
            sizes_of_call(leaves, program.loose)
        )  # not before: what is refused was seen by no rank

    def _is_new(self, program: RankProgram, leaves: Sequence[Any]) -> bool:
        """Whether sizes of a call are to be compared; most of ``generate``'s follow from its arguments."""
        if self.generating and len(program.seen) >= MOST_SIZES:
            return False
        return sizes_of_call(leaves, program.loose) not in program.seen

    def _compare_order(
        self, group: ProcessGroup, program: RankProgram, leaves: Sequence[Any], bound: dict[str, Any]
    ) -> None:
        """Notes a call; at times ranks compare what was run so far, and what this call is given."""
        sizes = sizes_of_call(leaves, program.loose)
        model = ", copy ".join(map(str, self.number))
        what = f"model {model}, {program.entry} {program.number}"
        if self.served:
            todo = "change a model before serve_ranks, on all ranks, or change it back"
            compare(group, "programs for a served call", [f"{what}, {sizes}"], todo)
        due = compare_order(group, (self.number, program.number, sizes), what)
        if due and not self.compare_calls and not self.generating and can_compare(leaves):
            self.compare(program.root, bound, program.entry, leaves)


def _refuse_transforms() -> None:
    """Refuses what does not see through programs: forward-mode derivatives would be zeros."""
    if nn_module._global_backward_hooks or nn_module._global_backward_pre_hooks:
        raise TpCompileError(
            "there are backward hooks on all modules, which the parts inside of a program would not run",
            where="the call",
            todo="register them on the modules that they are for",
        )
    if get_tracing_state() is not None:
        raise TpCompileError(
            "torch.jit.trace of a sharded model would hold this rank's parts, and one size",
            where="the call",
            todo="use model.save_program(folder), or trace the model before parallelize",
        )
    transformed = peek_interpreter_stack() is not None
    if transformed or forward_ad._current_level >= 0:
        raise TpCompileError(
            "torch.func and forward-mode derivatives do not see through the collectives of a sharded model",
            where="the call",
            todo="use backward, or torch.autograd.grad",
        )


def _capture_and_run(runtime: Runtime, model: nn.Module, bound: dict[str, Any], path: str) -> Any:
    if runtime.layout is not None and runtime.caches:
        divide_caches(bound, runtime.caches, runtime.layout, runtime.compiler.rank)
    leaves, spec = flatten_call(bound)
    training = model.get_submodule(path).training
    program = runtime.find(tuple(bound), leaves, spec, training, path)
    if program is None:
        try:
            program = add_program(runtime, model, bound, path)
        except TpCompileError as error:
            empty = not path and not any(isinstance(leaf, Tensor) for leaf in leaves)
            if empty or not compose_call(runtime, model, path, tuple(bound), error):
                raise
            return NotImplemented
    runtime._compare_first(program, model, bound, leaves)
    with torch.autocast(device_of(leaves), enabled=False):
        return runtime.run(program, leaves, bound)

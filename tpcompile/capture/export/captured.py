"""What capture hands to the compiler: one functional graph at global shapes, and how to call it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import is_
from typing import Any

import torch
from torch.fx import GraphModule

from tpcompile.capture.caches.call_results import CacheState, GivenCache
from tpcompile.capture.repeats.blocks import RepeatedBlocks
from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import TreeSpec, tree_unflatten
from tpcompile.ranks.describe import describe_value

from .checkpoint_calls import ContextFn
from .kept_calls import KeptCall
from .outer_places import Outer
from .specs import Extent, InputSpec, OutputSpec
from .state_writes import StateWrite


@dataclass
class Captured:
    """A model's forward for one call signature, as a functional ``fx`` graph at global shapes.

    Placeholders stand in the order of ``inputs`` (params, buffers, constants, user leaves), the output
    node holds one flat tuple in the order of ``outputs`` (user results, states, buffer mutations); every
    node has ``meta["val"]`` (fake tensors on the target device) and, where known,
    ``meta["nn_module_stack"]``.

    Run it as ``graph_module(*params, *buffers, *constants, *user_leaves)``, user tensors contiguous, and
    with autocast off: the casts of the autocast mode at capture are in the graph.

    Attributes:
        constants: values of the ``constant`` placeholders, by name.
        ranges: inclusive bounds of every symbol; None stands for no upper bound.
        guards: python expressions over the symbols that must hold, beyond ``ranges``.
        states: how the state outputs belong to the caches that the call was given.
        notes: what the user should know about this capture, such as dimensions that had to stay fixed.
        reads: the attributes of modules that python has read: path and name.
        outer: what its functions name outside of modules.
        baked: tensors of python state whose values are in the graph; None: any may be.
        writes: what the call leaves in python state; its tensors are the results of kind "attribute".
        detached: constants that want a gradient, and would get none.
        asks_gradients: python has asked whether gradients are recorded, or wanted.
        asks_strides: python depends on the order of elements in memory: arguments must be contiguous.
        functions: the user's autograd functions that the graph calls, by their keys there.
        gathers_again: what is gathered for linear layers is gathered again in backward.
        regions: the parts that are computed again in backward, by the names that their nodes are marked with;
            what is saved of each (None: nothing).
        blocks: which layers of the graph stand for others that are left out; ``inputs`` and ``outputs`` are
            those of the graph, the structures those of the whole call and its result.
    """

    graph_module: GraphModule
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    in_spec: TreeSpec
    out_spec: TreeSpec
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    ranges: dict[str, tuple[int, int | None]] = field(default_factory=dict)
    guards: tuple[str, ...] = ()
    states: tuple[CacheState, ...] = ()
    notes: tuple[str, ...] = ()
    reads: frozenset[tuple[str, str]] = frozenset()
    outer: tuple[Outer, ...] = ()
    baked: tuple[torch.Tensor, ...] | None = None
    writes: tuple[StateWrite, ...] = ()
    detached: tuple[str, ...] = ()
    asks_gradients: bool = False
    asks_strides: bool = False
    functions: dict[str, KeptCall] = field(default_factory=dict)
    regions: dict[str, ContextFn | None] = field(default_factory=dict)
    gathers_again: bool = False
    blocks: RepeatedBlocks | None = None

    @property
    def user_inputs(self) -> tuple[InputSpec, ...]:
        """The inputs that a call brings, in the order of the flattened call."""
        if self.blocks is not None:
            return self.blocks.users
        return tuple(spec for spec in self.inputs if spec.kind == "user")

    @property
    def whole_outputs(self) -> tuple[OutputSpec, ...]:
        """The results of the whole program."""
        return self.outputs if self.blocks is None else self.blocks.outputs

    def constant_lines(self) -> list[str]:
        """The constants as text: each one's name and form, and a hash of its values."""
        return [f"{name}: {describe_value(value)}" for name, value in sorted(self.constants.items())]

    def accepts(self, leaves: Sequence[Any]) -> str | None:
        """Return None if this program may run on ``leaves``, else a sentence that says why not.

        Only shapes are compared, and strides where python has asked for them: structure, dtypes and python
        values are ``RankProgram.fits``'s business.
        """
        users = self.user_inputs
        if len(leaves) != len(users):
            return f"the call has {len(leaves)} leaves, the program takes {len(users)}"
        sizes: dict[str, int] = {}
        derived: list[tuple[str, str, int]] = []
        for spec, leaf in zip(users, leaves, strict=True):
            if spec.extents is None:
                continue
            if not isinstance(leaf, torch.Tensor) or leaf.ndim != len(spec.extents):
                return f"{spec.name} is not a tensor of rank {len(spec.extents)}"
            if self.asks_strides and not leaf.is_contiguous():
                return f"{spec.name} is not contiguous, and forward asks for strides"
            for dim, (extent, size) in enumerate(zip(spec.extents, leaf.shape, strict=True)):
                if isinstance(extent, str) and extent not in self.ranges:
                    derived.append((f"{spec.name}.shape[{dim}]", extent, size))
                    continue
                refusal = self._refuse_size(extent, size, sizes)
                if refusal:
                    return f"{spec.name}.shape[{dim}] is {size}, {refusal}"
        return self._refuse_expressions(derived, sizes)

    def _refuse_size(self, extent: Extent, size: int, sizes: dict[str, int]) -> str | None:
        if isinstance(extent, int):
            return None if size == extent else f"the program was captured for {extent}"
        known = sizes.setdefault(extent, size)
        if known != size:
            return f"which must equal {extent} = {known}"
        low, high = self.ranges[extent]
        if size < low or (high is not None and size > high):
            return f"outside of {low} to {high if high is not None else 'any'}"
        return None

    def _refuse_expressions(self, derived: list[tuple[str, str, int]], sizes: dict[str, int]) -> str | None:
        # Expressions are printed by torch for python, from the program's own symbols: nothing of the user's.
        names: dict[str, Any] = {"math": math}
        try:
            for where, expression, size in derived:
                expected = eval(expression, names, sizes)
                if expected != size:
                    return f"{where} is {size}, the program needs {expression} = {expected}"
            for guard in self.guards:
                if not eval(guard, names, sizes):
                    return f"the program holds only where {guard}"
        except NameError as error:
            return f"a size of the program follows from no input size: {error}"
        return None

    @cached_property
    def _where_states_were(self) -> tuple[tuple[int, ...] | None, ...]:
        """Per state the places of the call's leaves that it was; None: that does not say all of it."""
        places = {spec.name: at for at, spec in enumerate(self.user_inputs)}
        at, found = self.out_spec.num_leaves, list[tuple[int, ...] | None]()
        for state in self.states:
            names = [spec.name for spec in self.outputs[at : at + state.count]]
            all_said = places.keys() >= {*names} and not any(facts for _, (_, facts) in state.layers)
            found.append(tuple(map(places.__getitem__, names)) if all_said else None)
            at += state.count
        return tuple(found)

    def unflatten(
        self, flat_outputs: Sequence[Any], bound: Mapping[str, Any], leaves: Sequence[Any] = ()
    ) -> Any:
        """Rebuild the model's own output structure from the graph's flat outputs.

        Caches that the call was given get their new state, and stand in the result where the model returned
        them. Buffer mutations at the end, if present, are left out.

        Args:
            flat_outputs: what the graph returned.
            bound: the call.
            leaves: the call, flat: a cache that was written in place is left alone; none: do not look.

        Raises:
            TpCompileError: there are more or fewer outputs than the program has.
        """
        count = self.out_spec.num_leaves
        if len(flat_outputs) < count:
            raise TpCompileError(
                f"{len(flat_outputs)} outputs given, the program has {count}",
                where="the result of forward",
                todo="report this program: it is a mistake of tpcompile",
            )
        at = count
        places = self._where_states_were if leaves else (None,) * len(self.states)
        for state, was in zip(self.states, places, strict=True):
            now = flat_outputs[at : at + state.count]
            if was is None or not all(map(is_, now, map(leaves.__getitem__, was))):
                state.put(bound[state.argument], now)
            at += state.count
        results = [
            bound[spec.value.argument] if isinstance(spec.value, GivenCache) else value
            for spec, value in zip(self.outputs[:count], flat_outputs[:count], strict=True)
        ]
        return tree_unflatten(results, self.out_spec)

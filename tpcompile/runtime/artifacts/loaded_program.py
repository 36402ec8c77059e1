"""A sharded model's programs without the model: called as it was, for inference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from tpcompile.capture.caches.layers import with_counts
from tpcompile.capture.export.captured import Captured
from tpcompile.capture.export.look_inside import first_unlike
from tpcompile.capture.export.size_check import size_check
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import CallSignature, Sizes, flatten_call, identical, leaf_names, sizes_of_call
from tpcompile.ir.torch_internals import TreeSpec
from tpcompile.ir.units import size_text
from tpcompile.planner.plan import Plan
from tpcompile.ranks.agree import telling_refusals
from tpcompile.ranks.compare_calls import MOST_SIZES, compare_call, compare_sizes
from tpcompile.ranks.compare_order import compare_order, number_of_model
from tpcompile.ranks.lost_ranks import telling
from tpcompile.ranks.mesh import local_device
from tpcompile.ranks.mesh_axis import MeshAxis
from tpcompile.ranks.turns import own_turn

from ..program import autocast_of, device_of
from ..value_checks import checks_among, refuse_failed
from .generating import loop_over, refuse_to_generate
from .package import Package


@dataclass(frozen=True)
class TensorFeed:
    """Where an input of a graph comes from that no call brings.

    Attributes:
        tensor: this rank's.
        segment: dimension, start and length of the part that is meant, or None for all of it.
        overwritten: the program writes into it: it is given a copy.
    """

    tensor: Tensor
    segment: tuple[int, ...] | None
    overwritten: bool

    def get(self) -> Tensor:
        """The value."""
        value = self.tensor if self.segment is None else self.tensor.narrow(*self.segment)
        return value.clone() if self.overwritten else value


@dataclass(eq=False)
class LoadedCall:
    """A call signature, see ``runtime.program.RankProgram``.

    Attributes:
        captured: what it takes and gives.
        graph_module: this rank's graph.
        feeds: where the graph's inputs come from; a number stands for a leaf of the call.
        mutated: the buffers that it changes.
        names: the arguments that are given.
        example: the leaves of the call that it was captured for, tensors without their values.
        numbers: which leaves are numbers that travel as sizes.
        loose: the places of the leaves that belong to no cache.
        same: which of these are the same tensor as an earlier one.
        wanted: of which tensors gradients are wanted, if forward has asked; None: it has not.
        autocast: the autocast type, or None.
        default: the default type of floating point numbers.
        package: the same as native code, for some sizes.
        seen: the sizes of calls that ranks have compared.
    """

    captured: Captured
    graph_module: GraphModule
    feeds: tuple[TensorFeed | int, ...]
    mutated: tuple[Tensor, ...]
    names: tuple[str, ...]
    example: tuple[Any, ...]
    numbers: frozenset[int]
    loose: tuple[int, ...]
    same: Mapping[int, int]
    wanted: Sequence[bool] | None
    autocast: torch.dtype | None
    default: torch.dtype
    package: Package | None = None
    seen: set[Sizes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._check = size_check(self.captured)
        self.checks = checks_among(self.captured.outputs)

    def refusal(self, names: tuple[str, ...], leaves: Sequence[Any], spec: TreeSpec) -> str:
        """Why a call is not of this signature; "" if it is."""
        if names != self.names:
            return f"it takes {', '.join(self.names)}"
        if len(leaves) != len(self.example) or spec != self.captured.in_spec:
            return "the arguments are made of other parts"
        if (at := first_unlike(leaves, self.example, self.numbers)) is not None:
            return f"{self.captured.inputs[at].name} is of another type, rank or value"
        if identical(leaves, self.loose) != self.same:
            return "other arguments are the same tensor"
        if self.wanted not in (None, [x.requires_grad for x in leaves if isinstance(x, Tensor)]):
            return "gradients of other arguments are wanted"
        if self.wanted is not None and torch.is_grad_enabled():
            return "forward asks whether gradients are recorded, so it is to be called under torch.no_grad()"
        if autocast_of(leaves) != self.autocast or torch.get_default_dtype() != self.default:
            return f"autocast was {self.autocast}, the default type {self.default}"
        counted = with_counts(leaves, self.numbers)
        return "" if self._check(counted) else self.captured.accepts(counted) or "other sizes"

    def run(self, leaves: Sequence[Any], bound: Mapping[str, Any]) -> Any:
        """Runs this rank's graph, and puts the result together."""
        leaves = with_counts(leaves, self.numbers)
        given = [x.contiguous() if isinstance(x, Tensor) else x for x in leaves]
        fetched = [given[f] if isinstance(f, int) else f.get() for f in self.feeds]
        flat = None if self.package is None else self.package.run(fetched)
        if flat is None:
            flat = self.graph_module.forward(*fetched)
        refuse_failed(self.checks, flat)
        for buffer, new in zip(self.mutated, flat[len(flat) - len(self.mutated) :], strict=True):
            buffer.copy_(new)
        return self.captured.unflatten(flat, bound, leaves)

    def __str__(self) -> str:
        shapes = [
            spec.name if spec.extents is None else f"{spec.name}: {'x'.join(map(str, spec.extents))}"
            for spec in self.captured.inputs
        ]
        return f"({', '.join(shapes)})"


class LoadedProgram:
    """What ``load_program`` gives: call it as the model was called.

    Attributes:
        name: the model's class.
        calls: the call signatures.
        tensors: what this rank has of the weights, and buffers and constants.
        plan: of the last of them.
    """

    def __init__(
        self,
        name: str,
        signature: CallSignature,
        calls: Sequence[LoadedCall],
        tensors: Mapping[str, Tensor],
        plan: Plan,
        axis: MeshAxis,
        generates: Mapping[str, Any],
    ) -> None:
        self.name, self.calls, self.tensors, self.plan = name, list(calls), dict(tensors), plan
        self._signature, self._axis, self._number = signature, axis, number_of_model(axis.group_name)
        self._generates = generates

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model would give, without gradients. All ranks make the same call.

        Raises:
            TpCompileError: no program was saved for such a call; gradients are wanted; ranks differ.
        """
        with own_turn(self._axis.group_name):
            group = self._axis.group
            with telling_refusals(group, f"a call of saved {self.name}"):
                bound = self._signature.bind_or_refuse(args, kwargs, self.name)
                leaves, spec = flatten_call(bound)
                self._check(leaves)
                call = self._find(bound, leaves, spec)
            place = self.calls.index(call)
            if (sizes := sizes_of_call(leaves, call.loose)) not in call.seen:
                names = leaf_names(bound)
                whole = [names[at] for at in call.loose], [leaves[at] for at in call.loose]
                if len(call.seen) < MOST_SIZES:
                    compare_call(group, "run", f"saved {self.name}", *whole)
                else:
                    compare_sizes(group, f"saved {self.name}", *whole)
                call.seen.add(sizes)
            compare_order(group, (self._number, place, sizes), f"saved model {self._number}, call {place}")
            with torch.no_grad(), torch.autocast(device_of(leaves), enabled=False):
                with telling(group, f"run saved {self.name}"):
                    return call.run(leaves, bound)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Tokens, as the model's own ``generate`` has them; all ranks make the same call.

        Prompt and steps must have been saved: let the model generate a few tokens, with the cache that is to
        be used, before ``save_program``. The configuration of the generation is what the model's was then;
        ``loop`` has it.

        Raises:
            TpCompileError: it is no decoder of transformers'; the calls were not saved; ranks differ.
        """
        return self.loop.generate(*args, **kwargs)

    @cached_property
    def loop(self) -> Any:
        """What transformers takes for the model while it generates; it has the ``generation_config``.

        Raises:
            TpCompileError: it is no decoder of transformers', or its configuration was not kept.
        """
        if (why := self._generates.get("refused")) is not None:
            raise refuse_to_generate(self.name, why)
        axis, device = self._axis, local_device(self._axis.device_type)
        return loop_over(self, self._generates, axis.group, axis.group_name, device)

    def _check(self, leaves: Sequence[Any]) -> None:
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                continue
            if leaf.requires_grad and torch.is_grad_enabled():
                what, todo = "a saved program records no gradients", "call it under torch.no_grad()"
                raise TpCompileError(what, where="the call", todo=todo)
            if leaf.numel() and leaf.device.type != self._axis.device_type:
                what = f"the program is for {self._axis.device_type}, a tensor is on {leaf.device}"
                raise TpCompileError(what, where="the call", todo=f"move it to {self._axis.device_type}")

    def _find(self, bound: dict[str, Any], leaves: Sequence[Any], spec: TreeSpec) -> LoadedCall:
        reasons = []
        for call in self.calls:
            if not (why := call.refusal(tuple(bound), leaves, spec)):
                return call
            reasons.append(f"{call}: {why}")
        raise TpCompileError(
            "no program was saved for such a call: " + "; ".join(reasons),
            where=f"saved {self.name}",
            todo="make such a call of the model before save_program, or give the arguments as there",
        )

    def __repr__(self) -> str:
        size = sum(tensor.nbytes for tensor in self.tensors.values())
        lines = [f"saved {self.name}, rank {self._axis.rank} of {self.plan.ranks}: {size_text(size)}"]
        return "\n".join([*lines, *(f"  {call}" for call in self.calls)])

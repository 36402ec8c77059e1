"""Faults of kinds that nobody would list: in graphs, in programs of all ranks, and in repeated layers."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from tests.helpers import toys
from tests.helpers.faults import Fault, edits_of_options
from tests.helpers.local_faults import Edit, GraphFault, retargeted
from tests.helpers.value_faults import SENDS, after, each, reals, sums
from tpcompile.capture.repeats.blocks import Repeat
from tpcompile.ir import markers
from tpcompile.ir.nodes import operands
from tpcompile.ir.placements import R, Shard
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.rules.choices import choices

aten, ops = torch.ops.aten, torch.ops.tpcompile


class Doubled(torch.autograd.Function):
    """The identity, with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class NotDoubled:
    """Stands for ``Doubled``, whose backward is lost."""

    apply = staticmethod(torch.clone)


class Counted(nn.Module):
    """An MLP with a buffer that it writes, a hook on one of its parts, and a backward of its own."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.last, self.function = toys.Mlp(), nn.Linear(12, 12), Doubled
        self.register_buffer("seen", torch.zeros(()))
        self.last.register_forward_hook(lambda module, args, result: 3 * result)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += 1
        y = self.function.apply(self.mlp(x))
        return self.last(y), y


class Hooked(Counted):
    """The same with a hook before that part as well."""

    def __init__(self) -> None:
        super().__init__()
        self.last.register_forward_pre_hook(lambda module, args: args[0] + 1)


class Repeated(nn.Module):
    """Layers that are alike, of which most are left out by capture."""

    def __init__(self, count: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(toys.Mlp() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def gradient_stops_for_one_use(program: GlobalProgram) -> Iterator[Edit]:
    """Of several uses of a value, one hands no gradient back."""
    for node in reals(program):
        for user in node.users if len(node.users) > 1 else ():
            yield lambda node=node, user=user: after(
                node, aten.detach.default, users=lambda u, user=user: u is user
            )


def one_use_of_a_summand(program: GlobalProgram) -> Iterator[Edit]:
    """One of several uses reads what a rank has before ranks have exchanged anything."""
    for node in program.graph.nodes:
        before = node.args[0] if node.target in markers.MARKERS else _before_joining(node)
        if isinstance(before, Node) and len(node.users) > 1:
            for user in node.users:
                yield lambda node=node, user=user, before=before: user.replace_input_with(node, before)


def _before_joining(node: Node) -> Any:
    """What a rank has of a sum that travels with others."""
    joined: Any = node.args[0] if node.target is operator.getitem else None
    if joined is None or joined.target is not markers.all_reduce_coalesced:
        return None
    return joined.args[0][node.args[1]]


def other_factor(place: Any) -> Any:
    """The same dimension, and another factor of it."""
    return replace(place, factor=place.factor + 1) if isinstance(place, Shard) else place


def noted_otherwise(program: GlobalProgram) -> Iterator[Edit]:
    """A call is noted to be computed in another way that its rule has."""
    assert program.planned_factors is not None
    for node in program.graph.nodes:
        noted = node.meta.get("choices")
        if noted and noted[0] is not None and operands(node) and node in program.planned_factors.rules:
            ways = choices(node, program.planned_factors, lambda _: True, program.axis_sizes[:1])
            for way in (w for w in ways if w != noted[0]):
                yield lambda node=node, way=way: node.meta.update(choices=(way, *node.meta["choices"][1:]))


def placed_otherwise(program: GlobalProgram) -> Iterator[Edit]:
    """A value is noted to be whole, or a weight to be divided the other way."""
    for node in program.graph.nodes:
        noted = node.meta.get("placement")
        if noted and any(p != R for p in noted):
            yield lambda node=node, noted=noted: node.meta.update(placement=(R,) * len(noted))


def stored_otherwise(program: GlobalProgram) -> Iterator[Edit]:
    """What is decided about a weight is not how it is stored."""
    for decision in program.decisions:
        for node, place in decision.params.items():
            if isinstance(place, Shard):
                other = R if node.meta["val"].ndim < 2 else Shard(1 - place.dim) if place.dim < 2 else R
                yield lambda decision=decision, node=node, other=other: decision.params.update({node: other})


def segments_of_other_order(program: GlobalProgram) -> Iterator[Edit]:
    """Two segments of one parameter, each taken for the other."""
    held = [(n, s) for n, s in program.sources.items() if s.order >= 0]
    for (one, mine), (two, theirs) in itertools.pairwise(held):
        if mine.spec.name == theirs.spec.name and mine.order != theirs.order:
            yield lambda one=one, two=two: exchange_sources(program, one, two)


def exchange_sources(program: GlobalProgram, one: Node, two: Node) -> None:
    """Each of two inputs is given what the other is to get."""
    program.sources[one], program.sources[two] = program.sources[two], program.sources[one]


def results_exchanged(program: GlobalProgram) -> Iterator[Edit]:
    """Two results of one shape, each returned as the other."""
    out = program.graph.output_node()
    results = list(out.args[0])  # type: ignore[arg-type]
    for at, (one, two) in enumerate(itertools.pairwise(results)):
        if isinstance(one, Node) and isinstance(two, Node) and one is not two:
            a, b = one.meta.get("val"), two.meta.get("val")
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype:
                new = (*results[:at], two, one, *results[at + 2 :])
                yield lambda new=new: setattr(out, "args", (new,))


def half_of_the_gradient(_: GlobalProgram, node: Node) -> None:
    """Forward stays as it is: x / 2 + x / 2, of which the second has no gradient."""
    readers = set(node.users)
    half = after(node, aten.mul.Tensor, 0.5)
    still = after(half, aten.detach.default)
    after(still, aten.add.Tensor, half, users=lambda user: user in readers)


def _one_more(size: Any) -> Any:
    return size + 1 if isinstance(size, int) and size else size


ODD: dict[str, Fault] = {
    "a gradient stops for one use": gradient_stops_for_one_use,
    "one use before the ranks exchange": one_use_of_a_summand,
    "half of a gradient": each(reals, half_of_the_gradient),
    "all-gather of another factor": edits_of_options(markers.all_gather, 2, other_factor),
    "shard of another factor": edits_of_options(markers.take_shard, 2, other_factor),
    "filled up to another size": edits_of_options(markers.pad_shard, 3, _one_more),
    "gathered to another size": edits_of_options(markers.all_gather, 3, _one_more),
    "computed in another way": noted_otherwise,
    "said to be whole": placed_otherwise,
    "stored otherwise": stored_otherwise,
    "segments taken for each other": segments_of_other_order,
    "results exchanged": results_exchanged,
    "a sum of absolute values": each(sums, lambda _, node: after(node, aten.abs.default)),
}
"""Put into rewritten graphs."""


def _small_left_out(program: GraphModule) -> Iterator[Edit]:
    """What a norm adds before it divides is zero."""
    for node in program.graph.nodes:
        for at, arg in enumerate(node.args if node.op == "call_function" else ()):
            if type(arg) is float and 0 < arg < 1e-3:
                yield lambda node=node, at=at: node.update_arg(at, 0.0)


def _rounded(program: GraphModule) -> Iterator[Edit]:
    """A number is given in half precision."""
    for node in program.graph.nodes:
        for at, arg in enumerate(node.args if node.op == "call_function" else ()):
            if type(arg) is float and (half := float(torch.tensor(arg).bfloat16())) != arg:
                yield lambda node=node, at=at, half=half: node.update_arg(at, half)


def _before_a_collective(target: Any, *args: Any) -> GraphFault:
    """What a rank sends is another value."""

    def fault(program: GraphModule) -> Iterator[Edit]:
        for node in program.graph.nodes:
            if node.target in SENDS:
                yield lambda node=node: _send(node, target, args)

    return fault


def _send(node: Node, target: Any, args: tuple[Any, ...]) -> None:
    value = node.args[0]
    assert isinstance(value, Node)
    with node.graph.inserting_before(node):
        other = node.graph.call_function(target, (value, *args))
    other.meta.update(value.meta)
    node.replace_input_with(value, other)


def _input_is_zero(program: GraphModule) -> Iterator[Edit]:
    """An input is given as zeros."""
    for node in program.graph.find_nodes(op="placeholder"):
        if isinstance(node.meta.get("val"), Tensor) and node.users:
            yield partial(_zeroed, node)


def _zeroed(node: Node) -> None:
    with node.graph.inserting_before(min(node.users)):
        zero = node.graph.call_function(aten.zeros_like.default, (node,))
    zero.meta.update(node.meta)
    node.replace_all_uses_with(zero, delete_user_cb=lambda user: user is not zero)


RANKS: dict[str, GraphFault] = {
    "a small number left out": _small_left_out,
    "a number in half precision": _rounded,
    "zeros are sent": _before_a_collective(aten.mul.Tensor, 0.0),
    "the opposite is sent": _before_a_collective(aten.neg.default),
    "rows in another order are sent": _before_a_collective(aten.flip.default, [0]),
    "an input is zero": _input_is_zero,
    "less, not at most": retargeted(aten.le.Tensor, aten.lt.Tensor),
    "a mean is a sum": retargeted(aten.mean.dim, aten.sum.dim_IntList),
    "exp is expm1": retargeted(aten.exp.default, aten.expm1.default),
    "a sine is a cosine": retargeted(aten.sin.default, aten.cos.default),
}
"""Put into one rank's program, or into those of all."""


def _moved_on(programs: Sequence[GraphModule]) -> list[GraphModule]:
    return [*programs[1:], programs[0]]


PROGRAMS: dict[str, Callable[[Sequence[GraphModule]], list[GraphModule]]] = {
    "ranks: each runs the program of the next": _moved_on,
    "ranks: all run the program of the first": lambda programs: [programs[0]] * len(programs),
}


def _shifted(by: Callable[[int], int]) -> Callable[[], AbstractContextManager[Any]]:
    right = Repeat.shifted

    def shifted(repeat: Repeat, name: str, periods: int) -> str:
        return right(repeat, name, by(periods))

    return lambda: patch.object(Repeat, "shifted", shifted)


LAYERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "layers: the weights of the layer before": _shifted(lambda periods: max(periods - 1, 0)),
    "layers: all have the weights of one": _shifted(lambda _: 0),
}
"""While a program is compiled of which layers are left out."""

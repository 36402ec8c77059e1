"""Faults of values: the placements of such programs may all be right, so that a run has to tell."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tests.helpers.faults import Fault
from tests.helpers.local_faults import Edit, GraphFault
from tpcompile.ir import markers
from tpcompile.ir.graph_edit import call
from tpcompile.ir.nodes import operands
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.rules.choices import Choice

aten, ops = torch.ops.aten, torch.ops.tpcompile
SENDS = (
    *(ops.all_reduce.default, ops.all_gather.default, ops.reduce_scatter.default, ops.all_to_all.default),
    *(ops.scatter_positions.default, ops.gather_positions.default, ops.copy_to_ranks.default),
)
_SUMS = (markers.all_reduce, markers.reduce_scatter)


def reals(program: GlobalProgram) -> list[Node]:
    """The calls that give one tensor of real numbers."""
    vals = [(n, n.meta.get("val")) for n in program.graph.nodes if n.op == "call_function" and n.users]
    return [n for n, v in vals if isinstance(v, Tensor) and v.is_floating_point() and n.meta.get("placement")]


def after(value: Node, target: Any, *args: Any, users: Callable[[Node], bool] = lambda _: True) -> Node:
    """Has users read what a call makes of a value."""
    readers = [user for user in value.users if users(user)]
    with value.graph.inserting_before(min(readers)):
        new = call(value.graph, target, (value, *args), like=value)
    _as_placed(new, value)
    for user in readers:
        user.replace_input_with(value, new)
    return new


def _as_placed(new: Node, value: Node) -> None:
    """Notes a call as a planned one, whose operands are placed as a value is."""
    placements, tensors = value.meta["placement"], len(operands(new))
    new.meta["placement"] = placements
    if new.target not in markers.MARKERS:
        new.meta["choices"] = tuple(Choice((p,) * tensors, (p,)) for p in placements)


def each(places: Callable[[GlobalProgram], list[Node]], edit: Callable[[GlobalProgram, Node], Any]) -> Fault:
    def fault(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
        for node in places(program):
            yield lambda node=node: edit(program, node)

    return fault


def sums(program: GlobalProgram) -> list[Node]:
    return [n for n in program.graph.nodes if n.target in _SUMS and n.users]


def _halved(program: GlobalProgram, node: Node) -> None:
    """What is summed up is rounded to half precision before."""
    value = node.args[0]
    assert isinstance(value, Node)
    kind = value.meta["val"].dtype
    with node.graph.inserting_before(node):
        half = call(node.graph, aten.to.dtype, (value, torch.bfloat16), like=value)
        back = call(node.graph, aten.to.dtype, (half, kind), like=value)
    _as_placed(half, value)
    _as_placed(back, value)
    node.replace_input_with(value, back)


def _gradient_doubled(program: GlobalProgram, node: Node) -> None:
    """Forward stays as it is: x + x - x, of which the last has no gradient."""
    readers = set(node.users)
    double = after(node, aten.mul.Tensor, 2.0)
    with node.graph.inserting_before(double):
        still = call(node.graph, aten.detach.default, (node,), like=node)
    _as_placed(still, node)
    after(double, aten.sub.Tensor, still, users=lambda user: user in readers)


def weights_swapped(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
    """Two weights of one shape and placement, each instead of the other."""
    held = [n for n, s in program.sources.items() if s.spec.kind == "param" and n.users]
    for one, two in itertools.combinations(held, 2):
        same = one.meta["val"].shape == two.meta["val"].shape
        if same and one.meta["placement"] == two.meta["placement"]:
            yield lambda one=one, two=two: _swap(one, two)


def _swap(one: Node, two: Node) -> None:
    readers = [(value, user) for value in (one, two) for user in list(value.users)]
    both = [user for value, user in readers if {one, two} <= set(user.all_input_nodes)]
    for value, user in readers:
        if user not in both:
            user.replace_input_with(value, two if value is one else one)
    exchanged = {one: two, two: one}
    for user in dict.fromkeys(both):
        user.args = torch.fx.node.map_arg(user.args, lambda n: exchanged.get(n, n))


def stale_value(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
    """A call reads an earlier value of the same shape and placement."""
    found = reals(program)
    for at, value in enumerate(found):
        for older in reversed(found[:at]):
            alike = older.meta["placement"] == value.meta["placement"]
            if alike and older.meta["val"].shape == value.meta["val"].shape:
                yield lambda older=older, value=value: value.replace_all_uses_with(older)
                break


def copied_elsewhere(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
    """The copy for gradients stands before another operand."""
    for node in program.graph.find_nodes(op="call_function", target=markers.copy_to_ranks):
        for user in node.users:
            for other in user.all_input_nodes:
                if other is not node and isinstance(other.meta.get("val"), Tensor):
                    yield lambda node=node, user=user, other=other: _copy_other(node, user, other)


def _copy_other(node: Node, user: Node, other: Node) -> None:
    user.replace_input_with(node, node.args[0])  # type: ignore[arg-type]
    after(other, markers.copy_to_ranks, node.args[1], users=lambda u: u is user)


def transposed(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
    """A square weight is read the other way round."""
    for node, source in program.sources.items():
        val = node.meta["val"]
        square = source.spec.kind == "param" and val.ndim == 2 and val.shape[0] == val.shape[1]
        if square and node.users and len(set(node.meta["placement"])) == 1:
            yield lambda node=node: after(node, aten.t.default)


def sums_swapped(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
    """Two sums over the ranks, each of the other's operand."""
    for one, two in itertools.pairwise(sums(program)):
        a, b = one.args[0], two.args[0]
        if isinstance(a, Node) and isinstance(b, Node) and a.meta["val"].shape == b.meta["val"].shape:
            if one < two and b < one:
                yield lambda one=one, two=two, a=a, b=b: _exchange_operands(one, two, a, b)


def _exchange_operands(one: Node, two: Node, a: Node, b: Node) -> None:
    one.replace_input_with(a, b)
    two.replace_input_with(b, a)


VALUES: dict[str, Fault] = {
    "half precision before a sum": each(sums, _halved),
    "a sum over the ranks is a mean": each(sums, lambda w, n: after(n, aten.div.Tensor, w.ranks)),
    "a sum times the ranks": each(sums, lambda w, n: after(n, aten.mul.Tensor, w.ranks)),
    "a gradient stops": each(reals, lambda _, n: after(n, aten.detach.default)),
    "a gradient counts twice": each(reals, _gradient_doubled),
    "weights swapped": weights_swapped,
    "an older value": stale_value,
    "gradient copy of another operand": copied_elsewhere,
    "a square weight transposed": transposed,
    "sums swapped": sums_swapped,
}
"""Put into rewritten graphs."""


def _arguments(kind: type, change: Callable[[Any], Any]) -> GraphFault:
    """An argument of a call is another one."""

    def fault(local: GraphModule) -> Iterator[Edit]:
        for node in local.graph.nodes:
            for at, arg in enumerate(node.args if node.op == "call_function" else ()):
                if type(arg) is kind:
                    yield lambda node=node, at=at, arg=arg: node.update_arg(at, change(arg))

    return fault


def order_swapped(local: GraphModule) -> Iterator[Edit]:
    """Of two collectives that do not need each other, the second comes first."""
    sends = [n for n in local.graph.nodes if n.target in SENDS]
    for one, two in itertools.pairwise(sends):
        needed = {two}
        for node in reversed(list(local.graph.nodes)):
            if node in needed:
                needed.update(node.all_input_nodes)
        if one not in needed:
            yield lambda one=one, needed=needed: _hoist(local, one, needed)


def _hoist(local: GraphModule, one: Node, needed: set[Node]) -> None:
    """Moves what a collective needs, and it, before another one."""
    between = [n for n in local.graph.nodes if one < n and n in needed]
    for node in between:
        one.prepend(node)


def another_group(local: GraphModule) -> Iterator[Edit]:
    """A collective over other ranks."""
    groups = sorted({str(n.args[1]) for n in local.graph.nodes if n.target in SENDS})
    for node in local.graph.nodes:
        for other in groups if node.target in SENDS else ():
            if other != node.args[1]:
                yield lambda node=node, other=other: node.update_arg(1, other)


def another_value(local: GraphModule) -> Iterator[Edit]:
    """A call reads another value of the same shape and type."""
    seen = list[Node]()
    for node in local.graph.nodes:
        for value in node.all_input_nodes if node.op == "call_function" else ():
            val = value.meta.get("val")
            for other in seen if isinstance(val, Tensor) else ():
                theirs = other.meta.get("val")
                if other is not value and isinstance(theirs, Tensor) and theirs.shape == val.shape:
                    if theirs.dtype == val.dtype:
                        yield lambda node=node, value=value, other=other: node.replace_input_with(
                            value, other
                        )
                        break
        seen.append(node)


LOCAL: dict[str, GraphFault] = {
    "a whole number changed": _arguments(int, lambda n: n + 1),
    "a flag changed": _arguments(bool, lambda b: not b),
    "order of collectives": order_swapped,
    "another group of ranks": another_group,
    "another value of the same shape": another_value,
}
"""Put into one rank's program, or into those of all."""

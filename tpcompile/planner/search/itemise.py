"""What the planner's modelled time is made of: weights that are read, calls, and moves between ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch.fx import Node

from tpcompile.ir.conversions import steps
from tpcompile.ir.markers import COMMUNICATING, Placements
from tpcompile.ir.nodes import producer, results
from tpcompile.rules.assignment import Assignment

from .axis_costs import AxisCosts
from .facts import Facts
from .must_divide import GATHERED, GATHERS


@dataclass(frozen=True)
class Item:
    """Something that takes time in a forward.

    Attributes:
        node: the weight, the call, or the value that moves.
        kind: ``read``, ``compute``, the name of a collective, or ``rearrange`` for a move that sends nothing.
        seconds: its time.
        times: how many of it the program has: a layer may stand for others.
    """

    node: Node
    kind: str
    seconds: float
    times: int


def itemise(facts: Facts, decisions: Sequence[Assignment]) -> Iterator[Item]:
    """The modelled time, item by item in the order of the program; it adds up to what the decisions cost."""
    *before, last = decisions
    costs = AxisCosts(facts, dict(enumerate(before)), len(before), [d.ranks for d in decisions])
    read: set[Node] = set()
    for node in facts.graph.nodes:
        for operand in node.all_input_nodes:
            if operand in facts.params and operand not in read:
                read.add(operand)
                yield from _read(facts, costs, last, operand)
                yield from _moves(facts, costs, decisions, operand)
        if node in last.nodes:
            seconds = costs.times(node, [last.nodes[node]])[0]
            yield Item(node, "compute", seconds, facts.times(node))
        if producer(node)[0] in last.nodes or node in facts.given:
            yield from _moves(facts, costs, decisions, node)
    for param in facts.params.keys() - read:
        yield from _read(facts, costs, last, param)


def _read(facts: Facts, costs: AxisCosts, last: Assignment, param: Node) -> Iterator[Item]:
    held = last.params[param]
    yield Item(param, "read", costs.hold_cost(param, held) - costs.price(param, held), facts.times(param))


def _moves(facts: Facts, costs: AxisCosts, decisions: Sequence[Assignment], value: Node) -> Iterator[Item]:
    """What it takes to bring a value to where it is used: once for all of several uses, then for each."""
    now = tuple(d.output(value) for d in decisions)
    if all(value in d.shared for d in decisions):
        handed = tuple(d.shared[value] for d in decisions)
        yield from _move(facts, costs, value, now, handed)
        now = handed
    for node, operand in facts.uses.get(value, ()):
        wanted = tuple(
            d.need(node, operand) if node in d.nodes else facts.result(node, value, axis)
            for axis, d in enumerate(decisions)
        )
        yield from _move(facts, costs, value, now, wanted)


def _move(facts: Facts, costs: AxisCosts, value: Node, src: Placements, dst: Placements) -> Iterator[Item]:
    if src == dst or not results(value):
        return
    at = len(src) - 1
    seconds = costs.conversions([src[at]], [dst[at]], value, (src[:at], dst[:at]))[0, 0]
    targets = [target for target, _, _ in steps(src, dst)]
    if value in facts.weights:  # what the planner holds against it is not time
        seconds -= GATHERED * sum(target in GATHERS for target in targets)
    sent = [target.__name__ for target in targets if target in COMMUNICATING]
    times = facts.ties.times.get(value) or facts.times(value)
    yield Item(value, " + ".join(sent) or "rearrange", float(seconds), times)

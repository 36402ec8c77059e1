"""Solves one sub-axis after the other, and again where a later decision makes a change worth it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch.fx import Node

from tpcompile.ir.placements import Placement
from tpcompile.rules.assignment import Assignment

from .axis_problem import solve_axis
from .facts import Facts

Worth = tuple[float, float, float]


def solve_axes(
    facts: Facts, axis_sizes: Sequence[int], pins: Callable[[int], Mapping[Node, frozenset[Placement]]]
) -> list[Assignment]:
    """The decisions on every axis: none of them can be improved while the others stay.

    Each axis is solved exactly, given those before it. Then each is solved again, given all others, until
    nothing changes. The objective is that of all axes together and falls with every change, so this ends.
    """
    found: dict[int, Assignment] = {}
    worth: Worth = (0.0, 0.0, 0.0)
    for axis in range(len(axis_sizes)):
        best = solve_axis(facts, axis_sizes, axis, found, pins(axis))
        found[axis] = _adding(best, worth, (0.0, 0.0, 0.0))
        worth = worth_of(best)
    settled, axis = 1, 0  # the last one was solved given all others
    while settled < len(axis_sizes):
        best = solve_axis(facts, axis_sizes, axis, {a: d for a, d in found.items() if a != axis}, pins(axis))
        if _better(worth_of(best), worth):
            found[axis] = _adding(best, worth, worth_of(found[axis]))
            worth, settled = worth_of(best), 0
        settled, axis = settled + 1, (axis + 1) % len(axis_sizes)
    return [found[a] for a in range(len(axis_sizes))]


def worth_of(decision: Assignment) -> Worth:
    """What the planner compares: penalty, price, time."""
    return decision.penalty, decision.price, decision.cost


def _better(new: Worth, old: Worth) -> bool:
    """Whether it is less, by more than rounding."""
    return (round(new[0], 6), round(new[1] + new[2], 12)) < (round(old[0], 6), round(old[1] + old[2], 12))


def _adding(best: Assignment, before: Worth, own: Worth) -> Assignment:
    """Decisions that are charged what all axes cost with them beyond what they cost before."""
    penalty, price, cost = (o + n - b for o, n, b in zip(own, worth_of(best), before, strict=True))
    return replace(best, penalty=penalty, price=price, cost=cost)

"""The placements on all sub-axes at once, as one min-sum problem: the oracle for planning them one by one.

Every variable of the search becomes a tuple with an entry per sub-axis, so domains multiply: an oracle for
small programs on two sub-axes, without caches, and without calls that refuse empty parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from tpcompile.ir.nodes import producer
from tpcompile.ir.placements import Placement, R, Shard
from tpcompile.planner.search.axis_costs import AxisCosts, exact
from tpcompile.planner.search.axis_problem import AxisProblem, _order
from tpcompile.planner.search.eliminate import Problem, solve
from tpcompile.planner.search.facts import Facts
from tpcompile.rules.assignment import Assignment
from tpcompile.rules.choices import Choice

Name = tuple[str, str]
Placed = tuple[Placement, ...]


class JointPlan:
    """Builds the problem of all axes from the costs that the search of each axis uses.

    Args:
        facts: the program and the cost model.
        axis_sizes: the sizes of the sub-axes.
    """

    def __init__(self, facts: Facts, axis_sizes: Sequence[int]) -> None:
        self.facts, self.axis_sizes = facts, axis_sizes
        self.problem, self.unavoidable = Problem(), 0.0
        # The choices and holdings that are possible on the first axis are all that there are.
        alone = AxisProblem(facts, axis_sizes, 0, {}, {}).build()
        self.ways = {n: list(self._combine(o, self._possible(n))) for n, o in alone.options.items()}
        self.holdings = {p: list(self._combine(h, self._may_hold(p))) for p, h in alone.holdings.items()}

    def worth(self) -> float:
        """The least penalty, price and time together."""
        for node, ways in self.ways.items():
            costs = [self._last(node, way, {}).times(node, [way[-1]])[0] for way in ways]
            self.problem.variable(("node", node.name), self.facts.times(node) * exact(costs))
        for param, holdings in self.holdings.items():
            self._hold(param, holdings)
        for value, uses in self.facts.uses.items():
            if value in self.holdings or producer(value)[0] in self.ways:
                self._connect(value, uses)
        return solve(self.problem)[1] + self.unavoidable

    def _hold(self, param: Node, holdings: list[Placed]) -> None:
        held = [self._last(param, {}, h) for h in holdings]
        penalties = [c.penalty(param, h[-1]) for c, h in zip(held, holdings, strict=True)]
        costs = [c.hold_cost(param, h[-1]) for c, h in zip(held, holdings, strict=True)]
        extra = [c + p - min(penalties) for c, p in zip(costs, penalties, strict=True)]
        self.unavoidable += self.facts.times(param) * min(penalties)
        self.problem.variable(("param", param.name), self.facts.times(param) * exact(extra))

    def _connect(self, value: Node, uses: list[tuple[Node, int]]) -> None:
        if value in self.holdings:
            source, outs = ("param", value.name), self.holdings[value]
        else:
            node, result = producer(value)
            source, outs = ("node", node.name), [tuple(s.outputs[result] for s in w) for w in self.ways[node]]
        if len(uses) > 1:
            wanted = [*outs, (R,) * len(self.axis_sizes), *(w for use in uses for w in self._wants(use))]
            kinds = list(
                itertools.product(*(sorted(set(each), key=_order) for each in zip(*wanted, strict=True)))
            )
            self.problem.variable(("shared", value.name), np.zeros(len(kinds)))
            self.problem.table((source, ("shared", value.name)), self._conversions(outs, kinds, value))
            source, outs = ("shared", value.name), kinds
        for use in uses:
            table = self._conversions(outs, self._wants(use), value)
            divided = use[0] in self.ways
            names = (source, ("node", use[0].name)) if divided else (source,)
            self.problem.table(names, table if divided else table[:, 0])

    def _wants(self, use: tuple[Node, int]) -> list[Placed]:
        node, operand = use
        if node in self.ways:
            return [tuple(s.inputs[operand] for s in way) for way in self.ways[node]]
        return [(R,) * len(self.axis_sizes)]

    def _conversions(self, src: list[Placed], dst: list[Placed], value: Node) -> np.ndarray:
        costs = self._last(value, {}, {})
        rows = [
            [costs.conversions([a[-1]], [b[-1]], value, (a[:-1], b[:-1]))[0, 0] for b in dst] for a in src
        ]
        return self.facts.times(value) * np.array(rows)

    def _last(self, about: Node, way: Any, held: Any) -> AxisCosts:
        """The costs on the last axis, given what is chosen for one node on those before it."""
        return self._costs(about, way, held, len(self.axis_sizes) - 1)

    def _costs(self, about: Node, way: Sequence[Choice], held: Placed, axis: int) -> AxisCosts:
        before = {
            a: Assignment(
                self.axis_sizes[a], {about: way[a]} if way else {}, {about: held[a]} if held else {}
            )
            for a in range(axis)
        }
        return AxisCosts(self.facts, before, axis, self.axis_sizes)

    def _combine(self, options: list[Any], possible: Callable[[tuple[Any, ...], Any], bool]) -> Iterator[Any]:
        """Tuples of options in which each entry is possible after those before it."""
        for way in itertools.product(options, repeat=len(self.axis_sizes)):
            if all(possible(way[:axis], way[axis]) for axis in range(len(way))):
                yield way

    def _possible(self, node: Node) -> Callable[[tuple[Choice, ...], Choice], bool]:
        def check(before: tuple[Choice, ...], choice: Choice) -> bool:
            costs = self._costs(node, before, (), len(before))
            return choice.factor is None or costs.left_in(node, choice.factor) >= 2

        return check

    def _may_hold(self, param: Node) -> Callable[[Placed, Placement], bool]:
        def check(before: Placed, placement: Placement) -> bool:
            if not isinstance(placement, Shard):
                return True
            place = placement.dim, placement.factor
            atom = self.facts.factors.places(param)[place]
            return self._costs(param, (), before, len(before)).left(param, place, atom) > 1

        return check

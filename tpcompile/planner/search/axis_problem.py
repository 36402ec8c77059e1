"""The problem of one axis: its variables, their choices, and what these cost.

One variable per node takes one of its choices, one per shared value chooses the placement in which it is
handed on (so that q, k and v pay for one conversion); every cost then involves at most two variables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch.fx import Node

from tpcompile.errors import TpCompileError
from tpcompile.ir.markers import Placements
from tpcompile.ir.nodes import producer, results
from tpcompile.ir.placements import Owned, Partial, Placement, R, Replicate, Shard
from tpcompile.rules.assignment import Assignment
from tpcompile.rules.choices import Choice, choices
from tpcompile.rules.factors import OpFactor
from tpcompile.rules.rule import Rule

from .axis_costs import AxisCosts, exact
from .eliminate import Problem, Table, extras, solve
from .facts import Facts

Name = tuple[str, str]
"""A variable: what it decides about (``node``, ``param`` or ``shared``) and the node's name."""


def solve_axis(
    facts: Facts,
    axis_sizes: Sequence[int],
    axis: int,
    others: Mapping[int, Assignment],
    pins: Mapping[Node, frozenset[Placement]] | None = None,
) -> Assignment:
    """The decisions of least cost on one axis, given those on some of the others.

    Args:
        facts: the program and the cost model.
        axis_sizes: the sizes of all axes.
        axis: which of them to decide on.
        others: what is decided on others already.
        pins: the placements that parameters may have on this axis.

    Returns:
        The decisions; penalty, price and cost are those of all decided axes together.

    Raises:
        TpCompileError: the pins cannot be met.
    """
    return AxisProblem(facts, axis_sizes, axis, others, pins or {}).build().solve()


class AxisProblem:
    """The problem of one axis, given what is decided on others."""

    def __init__(
        self,
        facts: Facts,
        axis_sizes: Sequence[int],
        axis: int,
        others: Mapping[int, Assignment],
        pins: Mapping[Node, frozenset[Placement]],
    ) -> None:
        self.facts, self.axis_sizes, self.axis, self.ties = facts, axis_sizes, axis, facts.ties
        self.ranks, self.others = axis_sizes[axis], {a: others[a] for a in sorted(others)}
        self.pins: dict[Node, frozenset[Placement]] = {}
        for param, allowed in pins.items():
            leader = self.ties.leader(param)
            self.pins[leader] = self.pins.get(leader, allowed) & allowed
        self.factors, self.costs = facts.factors, AxisCosts(facts, others, axis, axis_sizes)
        # On one rank there is nothing to divide, and nothing to send: the program stays as it was captured.
        self.candidates = facts.candidates | self._pinned() if self.ranks > 1 else set()
        self.problem = Problem()
        self.options: dict[Node, list[Choice]] = {}
        self.holdings: dict[Node, list[Placement]] = {}
        self.handed: dict[Node, list[Placement]] = {}
        self.unavoidable = 0.0

    def _pinned(self) -> set[int]:
        """The atoms that pins divide: a later call may use a weight that is divided in no matmul."""
        shards = [(param, p) for param, allowed in self.pins.items() for p in allowed if isinstance(p, Shard)]
        return {self.factors.places(param)[p.dim, p.factor] for param, p in shards}

    def build(self) -> AxisProblem:
        """Lists all choices and what they cost.

        Raises:
            TpCompileError: the pins cannot be met.
        """
        self._list_options()
        for node in self.options:
            self._compute(node)
        for param in self.facts.params:
            self._hold(param)
        for value in self.facts.given:
            self.problem.variable(self._name("param", value), [0.0])
        for value, uses in self.facts.uses.items():
            if value in self.holdings or producer(value)[0] in self.options:
                self._connect(value, uses)
        return self

    def extras(self) -> dict[Node, dict[Placement, float]]:
        """What every placement of every parameter costs more than the best one, penalties included."""
        found = extras(self.problem)
        costs = {param: found[self._name("param", param)] for param in self.facts.params}
        return {p: dict(zip(self.holdings[p], map(float, row), strict=True)) for p, row in costs.items()}

    def solve(self, param: Node | None = None, held: Placement | None = None) -> Assignment:
        """The decisions of least cost; of those with which a parameter is held so, if one is given.

        Raises:
            TpCompileError: there are none.
        """
        problem = self.problem
        if param is not None and held is not None:
            costs = np.array([0.0 if option == held else np.inf for option in self.holdings[param]])
            wish = ((self._name("param", param),), costs)
            problem = Problem(problem.domains, [*problem.tables, wish])
        chosen, cost = solve(problem)
        params = {n: h[chosen[self._name("param", n)]] for n, h in self.holdings.items()}
        penalty = sum(self.facts.times(n) * self.costs.penalty(n, p) for n, p in params.items())
        price = sum(self.facts.times(n) * self.costs.price(n, p) for n, p in params.items())
        return Assignment(
            self.ranks,
            {n: o[chosen[self._name("node", n)]] for n, o in self.options.items()},
            params,
            {n: h[chosen[self._name("shared", n)]] for n, h in self.handed.items()},
            penalty,
            price,
            cost - (penalty - self.unavoidable) - price,
        )

    # Choices.

    def _list_options(self) -> None:
        for node in self.facts.live:
            if results(node) and producer(node)[0] is node:
                self.options[node] = self._ways(node)
        for param in self.facts.params:
            self.holdings[param] = self._held(param)
        for value, placements in self.facts.given.items():
            self.holdings[value] = [placements[self.axis]]
        for value, uses in self.facts.uses.items():
            if len(uses) > 1 and (value in self.holdings or producer(value)[0] in self.options):
                wants = {w for u in uses for w in self._wants(u, value)}
                self.handed[value] = sorted({*self._source(value)[1], R, *wants}, key=_order)
        for value, before in self.ties.handed.items():
            if value in self.handed and before in self.handed:
                kinds = sorted({*self.handed[value], *self.handed[before]}, key=_order)
                self.handed[value] = self.handed[before] = kinds

    def _ways(self, node: Node) -> list[Choice]:
        rule = self.factors.rules.get(node)
        nonempty = isinstance(rule, Rule) and rule.nonempty

        def may_divide(factor: OpFactor) -> bool:
            if factor.atom not in self.candidates:
                return False
            # Rows of experts: no rank may be without one.
            everywhere = nonempty or not (factor.reduce or None not in factor.outputs)
            return self.costs.left_in(node, factor, fewest=everywhere) >= (self.ranks if everywhere else 2)

        return choices(node, self.factors, may_divide, self.axis_sizes[: self.axis + 1])

    def _held(self, param: Node) -> list[Placement]:
        places = self.factors.places(param)
        options: list[Placement] = [R]
        for (dim, pos), atom in places.items():
            if atom in self.candidates and self.costs.left(param, (dim, pos), atom) > 1:
                options.append(Shard(dim, pos))
        pins = self.pins.get(self.ties.leader(param))
        if pins is not None and self.ranks > 1:
            options = [o for o in options if o in pins]
        if pins is not None and not options:
            wanted = " or ".join(sorted(map(str, pins)))
            raise TpCompileError(
                f"{wanted} is not possible: no matmul has that dimension, or nothing of it is left to divide",
                where=self.facts.params[param],
                todo="pin another dimension, or none",
            )
        return options

    # Variables.

    def _name(self, kind: str, node: Node) -> Name:
        """The variable that decides about a node: one for all layers that are planned alike."""
        leader = (kind == "shared" and self.ties.handed_with(node)) or self.ties.leader(node)
        if leader is node:
            same = True
        elif kind == "shared":
            same = self.handed[node] == self.handed.get(leader)
        elif kind == "param":
            same = self.holdings[node] == self.holdings.get(leader)
        else:
            same = _placed(self.options[node]) == _placed(self.options.get(leader, []))
        return kind, (leader if same else node).name

    def _hold(self, param: Node) -> None:
        options = self.holdings[param]
        penalties = [self.costs.penalty(param, o) for o in options]
        # What no option avoids is left out, or thousands of seconds would swallow the nanoseconds.
        least, times = min(penalties, default=0.0), self.facts.times(param)
        self.unavoidable += times * least
        costs = [self.costs.hold_cost(param, o) + p - least for o, p in zip(options, penalties, strict=True)]
        self.problem.variable(self._name("param", param), times * exact(costs))

    def _compute(self, node: Node) -> None:
        costs = exact(self.costs.times(node, self.options[node]))
        self.problem.variable(self._name("node", node), self.facts.times(node) * costs)

    def _connect(self, value: Node, uses: list[tuple[Node, int]]) -> None:
        source, outs = self._source(value)
        lie = tuple(a.output(value) for a in self.others.values())
        if value not in self.handed:
            self._edge(source, outs, uses[0], value, lie)
            return
        kinds, name = self.handed[value], self._name("shared", value)
        handed = tuple(a.shared[value] for a in self.others.values())
        self.problem.variable(name, np.zeros(len(kinds)))
        self.problem.table((source, name), self._conversions(outs, kinds, value, (lie, handed)))
        for use in uses:
            self._edge(name, kinds, use, value, handed)

    def _edge(
        self, source: Name, outs: list[Placement], use: tuple[Node, int], value: Node, lie: Placements
    ) -> None:
        """A use of a value, which is placed so on the other axes."""
        wants = self._wants(use, value)
        wanted = tuple(self._wanted(use, value, axis) for axis in self.others)
        table = self._conversions(outs, wants, value, (lie, wanted))
        if use[0] in self.options:
            self.problem.table((source, self._name("node", use[0])), table)
        else:
            self.problem.table((source,), table[:, 0])

    def _conversions(
        self, src: list[Placement], dst: list[Placement], value: Node, others: tuple[Placements, Placements]
    ) -> Table:
        times = self.ties.times.get(value) or self.facts.times(value)
        return times * self.costs.conversions(src, dst, value, others)

    def _wants(self, use: tuple[Node, int], value: Node) -> list[Placement]:
        node, operand = use
        if node in self.options:
            return [s.inputs[operand] for s in self.options[node]]
        return [self.facts.result(node, value, self.axis)]

    def _wanted(self, use: tuple[Node, int], value: Node, axis: int) -> Placement:
        """What a use wants on another axis."""
        choice = self.others[axis].nodes.get(use[0])
        return choice.inputs[use[1]] if choice else self.facts.result(use[0], value, axis)

    def _source(self, value: Node) -> tuple[Name, list[Placement]]:
        if value in self.holdings:
            return self._name("param", value), self.holdings[value]
        node, result = producer(value)
        return self._name("node", node), [s.outputs[result] for s in self.options[node]]


def _placed(options: Sequence[Choice]) -> list[tuple[Sequence[Placement], Sequence[Placement]]]:
    return [(option.inputs, option.outputs) for option in options]


def _order(placement: Placement) -> tuple[int, Placement]:
    return [Replicate, Shard, Partial, Owned].index(type(placement)), placement

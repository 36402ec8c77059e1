"""The least-cost placements of a graph on one axis of the mesh, as a min-sum problem.

One variable per node chooses its strategy, one per shared value chooses the placement in which it is
handed on (so that q, k and v pay for one conversion); every cost then involves at most two variables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch.fx import Graph, Node

from ..errors import TpCompileError
from ..factors import Factors, OpFactor, producer
from ..placements import Owned, Partial, Placement, R, Replicate, Shard
from ..rules.rule import Rule, operands, results
from .assignment import Assignment
from .axis_costs import AxisCosts, exact
from .cost import CostModel
from .eliminate import Problem, Table, solve
from .quantities import Quantities
from .strategies import Strategy, strategies
from .tie_layers import Ties
from .weights import SMALL, held_elsewhere, matrix, shares, weight_root, worth_dividing

Name = tuple[str, str]
"""A variable: what it decides about (``node``, ``param`` or ``shared``) and the node's name."""

SHAPE_ONLY = (torch.ops.aten.sym_size.int,)
"""What needs no more of a value than its shape, in whatever placement."""


class Search:
    """Builds and solves the problem of one axis, given the axes before it.

    Args:
        graph: the captured graph at global shapes.
        factors: its rules and factors.
        params: parameter placeholders with their names, as the layout knows them.
        carried: results that stay divided (caches): the placement wanted per axis, or None for any.
        given: inputs that come divided (caches), with their placement per axis.
        cost: the cost model.
        divide_small: small matrices must be divided too, whatever it costs.
        times: how many nodes of the whole model a node stands for, where layers were left out of the graph.
        ties: what is decided alike in repeated layers.
    """

    def __init__(
        self,
        graph: Graph,
        factors: Factors,
        params: Mapping[Node, str],
        cost: CostModel,
        carried: Mapping[Node, Sequence[Placement] | None] | None = None,
        given: Mapping[Node, Sequence[Placement]] | None = None,
        divide_small: bool = False,
        times: Callable[[Node], int] = lambda _: 1,
        ties: Ties | None = None,
    ) -> None:
        self.times, self.ties = times, ties or Ties()
        self.graph, self.factors, self.params, self.cost_model = graph, factors, params, cost
        self.carried, self.given = carried or {}, given or {}
        self.candidates = worth_dividing(factors, set(params))
        self.quantities = Quantities(graph, factors)
        self.live = _descendants(graph, {*params, *self.given})
        self.bytes = {v: self.quantities.bytes(v) for v in (*params, *self.given, *self.live) if results(v)}
        self.uses = self._uses()
        own = held_elsewhere(factors)
        matrices = {v: self.bytes[v] for v in params if matrix(v) and v in self.uses and v not in own}
        share = shares(matrices, params)
        limit = 0.0 if divide_small else SMALL
        self.large = {v for v in matrices if share[v] >= limit}
        self.little = {v for v in matrices if share[v] < limit}
        roots = set(params)
        self.weights = {v for v in self.bytes if weight_root(v, roots) is not None}

    def plan(
        self, ranks: int, prior: list[Assignment], pins: Mapping[Node, frozenset[Placement]] | None = None
    ) -> Assignment:
        """Solves one axis.

        Raises:
            TpCompileError: the pins cannot be met.
        """
        return _Axis(self, ranks, prior, pins or {}).solve()

    def _uses(self) -> dict[Node, list[tuple[Node, int]]]:
        found: dict[Node, list[tuple[Node, int]]] = {}
        for node in self.graph.nodes:
            if node.op == "output":
                for out in node.args[0]:
                    if (
                        isinstance(out, Node)
                        and self.carried.get(out, ()) is not None
                        and isinstance(out.meta["val"], torch.Tensor)
                    ):
                        found.setdefault(out, []).append((node, 0))
            elif node in self.live and not _is_getitem(node) and node.target not in SHAPE_ONLY:
                for i, operand in enumerate(operands(node)):
                    found.setdefault(operand, []).append((node, i))
        return found


class _Axis:
    """The problem of one axis."""

    def __init__(
        self, search: Search, ranks: int, prior: list[Assignment], pins: Mapping[Node, frozenset[Placement]]
    ) -> None:
        self.search, self.ranks, self.prior, self.ties = search, ranks, prior, search.ties
        self.pins: dict[Node, frozenset[Placement]] = {}
        for param, allowed in pins.items():
            leader = self.ties.leader(param)
            self.pins[leader] = self.pins.get(leader, allowed) & allowed
        self.factors, self.costs = search.factors, AxisCosts(search, ranks, prior)
        # On one rank there is nothing to divide, and nothing to send: the program stays as it was captured.
        self.candidates = search.candidates if ranks > 1 else set()
        self.problem = Problem()
        self.options: dict[Node, list[Strategy]] = {}
        self.holdings: dict[Node, list[Placement]] = {}
        self.handed: dict[Node, list[Placement]] = {}
        self.unavoidable = 0.0

    def solve(self) -> Assignment:
        self._list_options()
        for node in self.options:
            self._compute(node)
        for param in self.search.params:
            self._hold(param)
        for value in self.search.given:
            self.problem.variable(self._name("param", value), [0.0])
        for value, uses in self.search.uses.items():
            if value in self.holdings or producer(value)[0] in self.options:
                self._connect(value, uses)
        chosen, cost = solve(self.problem)
        params = {n: h[chosen[self._name("param", n)]] for n, h in self.holdings.items()}
        penalty = sum(self.search.times(n) * self.costs.penalty(n, p) for n, p in params.items())
        price = sum(self.search.times(n) * self.costs.price(n, p) for n, p in params.items())
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
        for node in self.search.live:
            if not _is_getitem(node) and results(node):
                self.options[node] = self._ways(node)
        for param in self.search.params:
            self.holdings[param] = self._held(param)
        for value, placements in self.search.given.items():
            self.holdings[value] = [placements[len(self.prior)]]
        for value, uses in self.search.uses.items():
            if len(uses) > 1 and (value in self.holdings or producer(value)[0] in self.options):
                wants = {w for u in uses for w in self._wants(u, value)}
                self.handed[value] = sorted({*self._source(value)[1], R, *wants}, key=_order)
        for value, before in self.ties.handed.items():
            if value in self.handed and before in self.handed:
                kinds = sorted({*self.handed[value], *self.handed[before]}, key=_order)
                self.handed[value] = self.handed[before] = kinds

    def _ways(self, node: Node) -> list[Strategy]:
        rule = self.factors.rules.get(node)
        fewest = self.ranks if isinstance(rule, Rule) and rule.filled else 2

        def may_divide(factor: OpFactor) -> bool:
            # Rows of experts: no rank may be without one.
            least = fewest if factor.reduce or None not in factor.outputs else self.ranks
            return factor.atom in self.candidates and self.costs.left_in(node, factor) >= least

        return strategies(node, self.factors, may_divide, [*(a.ranks for a in self.prior), self.ranks])

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
                where=self.search.params[param],
                todo="pin another dimension, or none",
            )
        return options

    # Variables.

    def _name(self, kind: str, node: Node) -> Name:
        """The variable that decides about a node: one for all layers that are planned alike."""
        leader = self.ties.leader(node)
        if kind == "shared":
            leader = self.ties.handed_with(node) or leader
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
        least, times = min(penalties, default=0.0), self.search.times(param)
        self.unavoidable += times * least
        costs = [self.costs.hold_cost(param, o) + p - least for o, p in zip(options, penalties, strict=True)]
        self.problem.variable(self._name("param", param), times * exact(costs))

    def _compute(self, node: Node) -> None:
        costs = exact(self.costs.times(node, self.options[node]))
        self.problem.variable(self._name("node", node), self.search.times(node) * costs)

    def _connect(self, value: Node, uses: list[tuple[Node, int]]) -> None:
        source, outs = self._source(value)
        if value not in self.handed:
            self._edge(source, outs, uses[0], value)
            return
        kinds, name = self.handed[value], self._name("shared", value)
        self.problem.variable(name, np.zeros(len(kinds)))
        self.problem.table((source, name), self._conversions(outs, kinds, value))
        for use in uses:
            self._edge(name, kinds, use, value)

    def _edge(self, source: Name, outs: list[Placement], use: tuple[Node, int], value: Node) -> None:
        wants = self._wants(use, value)
        table = self._conversions(outs, wants, value)
        if use[0] in self.options:
            self.problem.table((source, self._name("node", use[0])), table)
        else:
            self.problem.table((source,), table[:, 0])

    def _conversions(self, src: list[Placement], dst: list[Placement], value: Node) -> Table:
        times = self.ties.times.get(value) or self.search.times(value)
        return times * self.costs.conversions(src, dst, value)

    def _wants(self, use: tuple[Node, int], value: Node) -> list[Placement]:
        node, operand = use
        if node in self.options:
            return [s.inputs[operand] for s in self.options[node]]
        carried = self.search.carried.get(value) if node.op == "output" else None
        return [carried[len(self.prior)] if carried else R]

    def _source(self, value: Node) -> tuple[Name, list[Placement]]:
        if value in self.holdings:
            return self._name("param", value), self.holdings[value]
        node, result = producer(value)
        return self._name("node", node), [s.outputs[result] for s in self.options[node]]


def _placed(options: Sequence[Strategy]) -> list[tuple[Sequence[Placement], Sequence[Placement]]]:
    return [(option.inputs, option.outputs) for option in options]


def _order(placement: Placement) -> tuple[int, Placement]:
    return [Replicate, Shard, Partial, Owned].index(type(placement)), placement


def _is_getitem(node: Node) -> bool:
    return node.op == "call_function" and producer(node)[0] is not node


def _descendants(graph: Graph, params: set[Node]) -> dict[Node, None]:
    """Call nodes below a parameter, in graph order; all else (masks, rotary tables) is replicated."""
    found: dict[Node, None] = {}
    for node in graph.nodes:
        if node.op == "call_function" and any(i in params or i in found for i in node.all_input_nodes):
            found[node] = None
    return found

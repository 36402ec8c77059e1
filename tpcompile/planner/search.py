"""The least-cost placements of a graph on one axis of the mesh, as a min-sum problem.

One variable per node chooses its strategy, one per shared value chooses the placement in which it is
handed on (so that q, k and v pay for one conversion); every cost then involves at most two variables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.fx import Graph, Node

from ..factors import Factors, OpFactor, Place, producer, tensor_of
from ..placements import Partial, Placement, R, Replicate, Shard, split_evenly
from ..rules.rule import Rule, Size, operands, results
from .cost import CostModel
from .eliminate import Problem, Table, solve
from .strategies import Strategy, strategies
from .weights import MUST_DIVIDE, SMALL, SMALL_PRICE, matrix, shares, weight_root, worth_dividing


@dataclass
class Assignment:
    """The decisions on one axis.

    Attributes:
        ranks: the size of the axis.
        nodes: per call node, how it is computed.
        params: per parameter placeholder, how it is held.
        shared: per value with several uses, the placement in which it is handed on.
        penalty: what large parameters that are not divided were held to cost.
        cost: the rest of the modelled cost, in seconds.
    """

    ranks: int
    nodes: dict[Node, Strategy] = field(default_factory=dict)
    params: dict[Node, Placement] = field(default_factory=dict)
    shared: dict[Node, Placement] = field(default_factory=dict)
    penalty: float = 0.0
    cost: float = 0.0

    def output(self, value: Node) -> Placement:
        """The placement in which a value is computed."""
        if value in self.params:
            return self.params[value]
        node, result = producer(value)
        strategy = self.nodes.get(node)
        return strategy.outputs[result] if strategy else R

    def need(self, node: Node, operand: int) -> Placement:
        """The placement in which a node wants an operand."""
        strategy = self.nodes.get(node)
        return strategy.inputs[operand] if strategy else R


class Search:
    """Builds and solves the problem of one axis, given the axes before it.

    Args:
        graph: the captured graph at global shapes.
        factors: its rules and factors.
        params: parameter placeholders with their names, as the layout knows them.
        free: values that the program returns as they are (caches), in any placement.
        cost: the cost model.
        divide_small: small matrices must be divided too, whatever it costs.
    """

    def __init__(
        self,
        graph: Graph,
        factors: Factors,
        params: Mapping[Node, str],
        cost: CostModel,
        free: frozenset[Node] = frozenset(),
        divide_small: bool = False,
    ) -> None:
        self.graph, self.factors, self.params, self.cost_model, self.free = graph, factors, params, cost, free
        self.small = 0.0 if divide_small else SMALL
        self.candidates = worth_dividing(factors, set(params))
        self.hints = symbol_hints(graph)
        self.live = _descendants(graph, set(params))
        self.bytes = {v: self._bytes(v) for v in (*params, *self.live) if results(v)}
        weights = {v.name: self.bytes[v] for v in params if matrix(v)}
        self.share = shares(weights, {v.name: n for v, n in params.items()})
        self.uses = self._uses()
        self.weights = {v for v in self.bytes if weight_root(v, set(params)) is not None}

    def plan(
        self, ranks: int, prior: list[Assignment], pins: Mapping[Node, frozenset[Placement]] | None = None
    ) -> Assignment:
        """Solves one axis.

        Raises:
            TpCompileError: the pins cannot be met.
        """
        return _Axis(self, ranks, prior, pins or {}).solve()

    def number(self, size: Size) -> float:
        """A size as a number, dynamic dimensions as in the example."""
        return float(size) if isinstance(size, int) else float(size.subs(self.hints))

    def _bytes(self, value: Node) -> float:
        return max(
            math.prod(_hint(s) for s in t.shape) * t.element_size() for t in results(value)
        )

    def _uses(self) -> dict[Node, list[tuple[Node, int]]]:
        found: dict[Node, list[tuple[Node, int]]] = {}
        for node in self.graph.nodes:
            if node.op == "output":
                for out in node.args[0]:
                    if isinstance(out, Node) and out not in self.free and isinstance(out.meta["val"], torch.Tensor):
                        found.setdefault(out, []).append((node, 0))
            elif node in self.live and not _is_getitem(node):
                for i, operand in enumerate(operands(node)):
                    found.setdefault(operand, []).append((node, i))
        return found


class _Axis:
    """The problem of one axis."""

    def __init__(
        self, search: Search, ranks: int, prior: list[Assignment], pins: Mapping[Node, frozenset[Placement]]
    ) -> None:
        self.search, self.ranks, self.prior, self.pins = search, ranks, prior, pins
        self.factors, self.model = search.factors, search.cost_model
        self.problem = Problem()
        self.options: dict[Node, list[Strategy]] = {}
        self.holdings: dict[Node, list[Placement]] = {}
        self.handed: dict[Node, list[Placement]] = {}

    def solve(self) -> Assignment:
        for node in self.search.live:
            if not _is_getitem(node) and results(node):
                self._compute(node)
        for param in self.search.params:
            self._hold(param)
        for value, uses in self.search.uses.items():
            if value in self.holdings or producer(value)[0] in self.options:
                self._connect(value, uses)
        chosen, cost = solve(self.problem)
        params = {n: h[chosen["param", n.name]] for n, h in self.holdings.items()}
        penalty = sum(self._penalty(n, p) for n, p in params.items())
        return Assignment(
            self.ranks,
            {n: o[chosen["node", n.name]] for n, o in self.options.items()},
            params,
            {n: h[chosen["shared", n.name]] for n, h in self.handed.items()},
            penalty,
            cost - penalty,
        )

    # Variables.

    def _hold(self, param: Node) -> None:
        places = self.factors.places(param)
        options: list[Placement] = [R]
        for (dim, pos), atom in places.items():
            if atom in self.search.candidates and self._left(param, (dim, pos), atom) > 1:
                options.append(Shard(dim, pos))
        if param in self.pins:
            options = [o for o in options if o in self.pins[param]]
        self.holdings[param] = options
        self.problem.variable(("param", param.name), [self._hold_price(param, o) for o in options])

    def _compute(self, node: Node) -> None:
        def may_divide(factor: OpFactor) -> bool:
            return factor.atom in self.search.candidates and self._left_in(node, factor) > 1

        options = strategies(node, self.factors, may_divide)
        self.options[node] = options
        self.problem.variable(("node", node.name), [self._time(node, o) for o in options])

    def _connect(self, value: Node, uses: list[tuple[Node, int]]) -> None:
        source, outs = self._source(value)
        if len(uses) == 1:
            self._edge(source, outs, uses[0], value)
            return
        kinds = sorted({*outs, R, *(w for u in uses for w in self._wants(u))}, key=_order)
        self.handed[value] = kinds
        name = ("shared", value.name)
        self.problem.variable(name, np.zeros(len(kinds)))
        self.problem.table((source, name), self._conversions(outs, kinds, value))
        for use in uses:
            self._edge(name, kinds, use, value)

    def _edge(self, source: tuple[str, str], outs: list[Placement], use: tuple[Node, int], value: Node) -> None:
        wants = self._wants(use)
        table = self._conversions(outs, wants, value)
        if use[0] in self.options:
            self.problem.table((source, ("node", use[0].name)), table)
        else:
            self.problem.table((source,), table[:, 0])

    def _wants(self, use: tuple[Node, int]) -> list[Placement]:
        node, operand = use
        return [s.inputs[operand] for s in self.options[node]] if node in self.options else [R]

    def _source(self, value: Node) -> tuple[tuple[str, str], list[Placement]]:
        if value in self.holdings:
            return ("param", value.name), self.holdings[value]
        node, result = producer(value)
        return ("node", node.name), [s.outputs[result] for s in self.options[node]]

    # Costs.

    def _conversions(self, src: list[Placement], dst: list[Placement], value: Node) -> Table:
        # A weight is never gathered: that would be another kind of parallelism, with its memory.
        weight = value in self.search.weights
        size = self.search.bytes[value] / self._earlier(value)
        rule = self.factors.rules.get(producer(value)[0])
        statistic = isinstance(rule, Rule) and bool(rule.reduce) and not rule.contraction

        def cost(a: Placement, b: Placement) -> float:
            if weight and isinstance(a, Shard) and a != b:
                return math.inf
            return self.model.reshard(a, b, size, self.ranks, statistic=statistic)

        return np.array([[cost(a, b) for b in dst] for a in src])

    def _time(self, node: Node, strategy: Strategy) -> float:
        rule = self.factors.rules.get(node)
        share = self._largest(self._left_in(node, strategy.factor)) if strategy.factor else 1.0
        value = self.search.bytes[node]
        earlier = 1.0
        for assignment in self.prior:
            if assignment.nodes[node].factor:
                earlier *= assignment.ranks
        if isinstance(rule, Rule) and rule.contraction:
            work = 2 * math.prod(self.search.number(s) for s in rule.sizes.values())
            return work * share / earlier / self.model.flops
        # Elementwise work is fused: it breaks ties and no more. A partial value is reduced early.
        late = 1e-9 if any(isinstance(o, Partial) for o in strategy.outputs) and not strategy.factor else 0.0
        return 0.05 * self.model.touch(value) * share / earlier + late

    def _hold_price(self, param: Node, placement: Placement) -> float:
        """Reading what a rank holds, and the penalty of a matrix that stays whole."""
        size = self.search.bytes[param] / self._earlier(param)
        if isinstance(placement, Shard):
            part = self._largest(self._left(param, (placement.dim, placement.factor)))
            return self.model.touch(size * part) + self._penalty(param, placement)
        price = self.model.touch(size)
        if not matrix(param):
            return price
        if self.search.share[param.name] >= self.search.small:
            return price + self._penalty(param, placement)
        made = [self.search.bytes[n] for n, _ in self.search.uses.get(param, []) if n in self.options]
        return price + SMALL_PRICE * self.model.all_gather(min(made, default=0.0), self.ranks)

    def _penalty(self, param: Node, placement: Placement) -> float:
        """The price of a large matrix that is whole, or that more than half of the ranks have no part of."""
        if not matrix(param) or self.search.share[param.name] < self.search.small or param not in self.search.uses:
            return 0.0
        if isinstance(placement, Shard):
            part = self._largest(self._left(param, (placement.dim, placement.factor)))
            return MUST_DIVIDE * (part - 1 / self.ranks) if part * self.ranks >= 2 else 0.0
        return MUST_DIVIDE

    def _largest(self, units: int) -> float:
        """The share of the units that the fullest rank gets."""
        return max(split_evenly(units, self.ranks)) / units

    # What earlier axes left.

    def _left(self, param: Node, place: Place, atom: int | None = None) -> int:
        size = self.factors.size(atom if atom is not None else self.factors.places(param)[place])
        assert isinstance(size, int)
        for assignment in self.prior:
            if assignment.params[param] == Shard(*place):
                size = -(-size // assignment.ranks)
        return size

    def _left_in(self, node: Node, factor: OpFactor) -> int:
        size = factor.size
        assert isinstance(size, int)
        for assignment in self.prior:
            if assignment.nodes[node].factor == factor:
                size = -(-size // assignment.ranks)
        return size

    def _earlier(self, value: Node) -> float:
        return math.prod(a.ranks for a in self.prior if isinstance(a.output(value), Shard))


def _order(placement: Placement) -> tuple[int, Placement]:
    kind = 0 if isinstance(placement, Replicate) else 1 if isinstance(placement, Shard) else 2
    return kind, placement


def _is_getitem(node: Node) -> bool:
    return node.op == "call_function" and producer(node)[0] is not node


def _hint(size: int | torch.SymInt) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def symbol_hints(graph: Graph) -> dict[object, int]:
    """The example's sizes of the dynamic dimensions."""
    hints: dict[object, int] = {}
    for node in graph.find_nodes(op="placeholder"):
        if isinstance(node.meta.get("val"), torch.Tensor):
            for size in node.meta["val"].shape:
                if isinstance(size, torch.SymInt):
                    hints[size.node.expr] = _hint(size)
    return hints


def _descendants(graph: Graph, params: set[Node]) -> dict[Node, None]:
    """Call nodes below a parameter, in graph order; all else (masks, rotary tables) is replicated."""
    found: dict[Node, None] = {}
    for node in graph.nodes:
        if node.op == "call_function" and any(i in params or i in found for i in node.all_input_nodes):
            found[node] = None
    return found

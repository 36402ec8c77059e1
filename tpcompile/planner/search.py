"""The least-cost placements of a graph on one axis of the mesh, as a min-sum problem.

One variable per node chooses its strategy, one per shared value chooses the placement in which it is
handed on (so that q, k and v pay for one conversion); every cost then involves at most two variables.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.fx import Graph, Node

from ..errors import TpCompileError
from ..factors import Factors, OpFactor, Place, producer
from ..placements import Owned, Partial, Placement, R, Replicate, Shard, split_evenly
from ..rules.rule import Rule, Size, letters_of, operands, results
from .cost import CostModel
from .eliminate import Problem, Table, solve
from .strategies import Strategy, strategies
from .weights import MUST_DIVIDE, SMALL, SMALL_PRICE, matrix, shares, weight_root, worth_dividing

Name = tuple[str, str]
"""A variable: what it decides about (``node``, ``param`` or ``shared``) and the node's name."""

SHAPE_ONLY = (torch.ops.aten.sym_size.int,)
"""What needs no more of a value than its shape, in whatever placement."""

EXACT = 2.0**44
"""Costs are counted in units of 1 / EXACT seconds; sums of them are exact up to 512 s."""


# How much of its memory traffic an elementwise operator counts. More would let a large activation pay for
# statistics that are reduced by themselves: norms on a divided hidden dimension, with twice the collectives.
TIE_BREAK = 1e-4


@dataclass
class Assignment:
    """The decisions on one axis.

    Attributes:
        ranks: the size of the axis.
        nodes: per call node, how it is computed.
        params: per parameter placeholder, how it is held.
        shared: per value with several uses, the placement in which it is handed on.
        penalty: what large parameters that are not divided were held to cost.
        price: what small parameters that are not divided were held to cost.
        cost: the modelled time in seconds.
    """

    ranks: int
    nodes: dict[Node, Strategy] = field(default_factory=dict)
    params: dict[Node, Placement] = field(default_factory=dict)
    shared: dict[Node, Placement] = field(default_factory=dict)
    penalty: float = 0.0
    price: float = 0.0
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
        carried: results that stay divided (caches): the placement wanted per axis, or None for any.
        given: inputs that come divided (caches), with their placement per axis.
        cost: the cost model.
        divide_small: small matrices must be divided too, whatever it costs.
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
    ) -> None:
        self.graph, self.factors, self.params, self.cost_model = graph, factors, params, cost
        self.carried, self.given = carried or {}, given or {}
        self.candidates = worth_dividing(factors, set(params))
        self.hints = symbol_hints(graph)
        self.live = _descendants(graph, {*params, *self.given})
        self.bytes = {v: self._bytes(v) for v in (*params, *self.given, *self.live) if results(v)}
        self.uses = self._uses()
        matrices = {v: self.bytes[v] for v in params if matrix(v) and v in self.uses}
        share = shares(matrices, params)
        limit = 0.0 if divide_small else SMALL
        self.large = {v for v in matrices if share[v] >= limit}
        self.little = {v for v in matrices if share[v] < limit}
        self._numbers: dict[Size, float] = {}
        self._operations: dict[Node, float] = {}
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

    def number(self, size: Size) -> float:
        """A size as a number, dynamic dimensions as in the example."""
        if isinstance(size, int):
            return float(size)
        if size not in self._numbers:  # substituting is slow, and a model has few different sizes
            self._numbers[size] = float(size.subs(self.hints))
        return self._numbers[size]

    def operations(self, node: Node) -> float:
        """The arithmetic of a matmul-like node, 0 for any other."""
        if node not in self._operations:
            rule = self.factors.rules.get(node)
            counts = isinstance(rule, Rule) and rule.contraction
            self._operations[node] = self._contract(rule) if counts else 0.0  # type: ignore[arg-type]
        return self._operations[node]

    def _contract(self, rule: Rule) -> float:
        """Operands multiplied one after the other, so that attention is two matmuls.

        A letter that one operand alone has, and no result, selects (a vocabulary, grouped experts) and
        costs nothing; operands that bring no new letter (masks, biases) are added.
        """
        terms = [letters_of(t) for i, t in enumerate(rule.inputs) if i not in rule.once]
        seen = frozenset[str]().union(*terms[:2])
        terms = terms[:2] + [t for t in terms[2:] if not t <= seen]
        kept = frozenset[str]().union(*map(letters_of, rule.outputs))
        alone = {x for t in terms for x in t - kept if sum(x in other for other in terms) == 1}
        total, have = 0.0, terms[0] - alone
        for i, term in enumerate(terms[1:], 1):
            have |= term - alone
            total += 2 * math.prod(self.number(rule.sizes[x]) for x in have)
            have &= kept.union(*terms[i + 1 :])
        return total

    def _bytes(self, value: Node) -> float:
        return max(math.prod(_hint(s) for s in t.shape) * t.element_size() for t in results(value))

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
        self.search, self.ranks, self.prior, self.pins = search, ranks, prior, pins
        self.factors, self.model = search.factors, search.cost_model
        self.problem = Problem()
        self.options: dict[Node, list[Strategy]] = {}
        self.holdings: dict[Node, list[Placement]] = {}
        self.handed: dict[Node, list[Placement]] = {}
        self.tables: dict[Hashable, Table] = {}
        self.unavoidable = 0.0

    def solve(self) -> Assignment:
        for node in self.search.live:
            if not _is_getitem(node) and results(node):
                self._compute(node)
        for param in self.search.params:
            self._hold(param)
        for value, placements in self.search.given.items():
            self.holdings[value] = [placements[len(self.prior)]]
            self.problem.variable(("param", value.name), [0.0])
        for value, uses in self.search.uses.items():
            if value in self.holdings or producer(value)[0] in self.options:
                self._connect(value, uses)
        chosen, cost = solve(self.problem)
        params = {n: h[chosen["param", n.name]] for n, h in self.holdings.items()}
        penalty = sum(self._penalty(n, p) for n, p in params.items())
        price = sum(self._price(n, p) for n, p in params.items())
        return Assignment(
            self.ranks,
            {n: o[chosen["node", n.name]] for n, o in self.options.items()},
            params,
            {n: h[chosen["shared", n.name]] for n, h in self.handed.items()},
            penalty,
            price,
            cost - (penalty - self.unavoidable) - price,
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
        if not options:
            wanted = " or ".join(sorted(map(str, self.pins[param])))
            raise TpCompileError(
                f"{wanted} is not possible: no matmul has that dimension, or nothing of it is left to divide",
                where=self.search.params[param],
                todo="pin another dimension, or none",
            )
        self.holdings[param] = options
        penalties = [self._penalty(param, o) for o in options]
        # What no option avoids is left out, or thousands of seconds would swallow the nanoseconds.
        least = min(penalties, default=0.0)
        self.unavoidable += least
        costs = [self._hold_cost(param, o) + p - least for o, p in zip(options, penalties, strict=True)]
        self.problem.variable(("param", param.name), _exact(costs))

    def _compute(self, node: Node) -> None:
        rule = self.factors.rules.get(node)
        fewest = self.ranks if isinstance(rule, Rule) and rule.filled else 2

        def may_divide(factor: OpFactor) -> bool:
            # Rows of experts: no rank may be without one.
            least = fewest if factor.reduce or None not in factor.outputs else self.ranks
            return factor.atom in self.search.candidates and self._left_in(node, factor) >= least

        options = strategies(node, self.factors, may_divide)
        self.options[node] = options
        self.problem.variable(("node", node.name), _exact(self._times(node, options)))

    def _connect(self, value: Node, uses: list[tuple[Node, int]]) -> None:
        source, outs = self._source(value)
        if len(uses) == 1:
            self._edge(source, outs, uses[0], value)
            return
        kinds = sorted({*outs, R, *(w for u in uses for w in self._wants(u, value))}, key=_order)
        self.handed[value] = kinds
        name = ("shared", value.name)
        self.problem.variable(name, np.zeros(len(kinds)))
        self.problem.table((source, name), self._conversions(outs, kinds, value))
        for use in uses:
            self._edge(name, kinds, use, value)

    def _edge(self, source: Name, outs: list[Placement], use: tuple[Node, int], value: Node) -> None:
        wants = self._wants(use, value)
        table = self._conversions(outs, wants, value)
        if use[0] in self.options:
            self.problem.table((source, ("node", use[0].name)), table)
        else:
            self.problem.table((source,), table[:, 0])

    def _wants(self, use: tuple[Node, int], value: Node) -> list[Placement]:
        node, operand = use
        if node in self.options:
            return [s.inputs[operand] for s in self.options[node]]
        carried = self.search.carried.get(value) if node.op == "output" else None
        return [carried[len(self.prior)] if carried else R]

    def _source(self, value: Node) -> tuple[Name, list[Placement]]:
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

        key = (tuple(src), tuple(dst), size, weight, statistic)
        if key not in self.tables:
            self.tables[key] = _exact(
                [[self._conversion(a, b, size, weight, statistic) for b in dst] for a in src]
            )
        return self.tables[key]

    def _conversion(self, a: Placement, b: Placement, size: float, weight: bool, statistic: bool) -> float:
        if weight and isinstance(a, Shard) and a != b:
            return math.inf
        return self.model.reshard(a, b, size, self.ranks, statistic=statistic)

    def _times(self, node: Node, options: list[Strategy]) -> list[float]:
        """What each strategy of a node costs by itself."""
        earlier = math.prod(a.ranks for a in self.prior if a.nodes[node].factor)
        rule = self.factors.rules.get(node)
        if isinstance(rule, Rule) and rule.contraction:
            whole = self.search.operations(node) / self.model.flops / earlier
            return [whole * self._share(node, o) for o in options]
        # Elementwise work is fused: it breaks ties and no more. A partial value is reduced early.
        whole = TIE_BREAK * self.model.touch(self.search.bytes[node]) / earlier
        return [whole * self._share(node, o) + (1e-9 if _passes_partial(o) else 0.0) for o in options]

    def _share(self, node: Node, strategy: Strategy) -> float:
        """The share of a node's work that the fullest rank has."""
        return self._largest(self._left_in(node, strategy.factor)) if strategy.factor else 1.0

    def _hold_cost(self, param: Node, placement: Placement) -> float:
        """Reading what a rank holds, and what is held against leaving a small matrix whole."""
        size = self.search.bytes[param] / self._earlier(param)
        if isinstance(placement, Shard):
            size *= self._largest(self._left(param, (placement.dim, placement.factor)))
        return self.model.touch(size) + self._price(param, placement)

    def _penalty(self, param: Node, placement: Placement) -> float:
        """The price of a large matrix that is whole, or that half of the ranks or more have no part of."""
        if param not in self.search.large:
            return 0.0
        if isinstance(placement, Shard):
            part = self._largest(self._left(param, (placement.dim, placement.factor)))
            return MUST_DIVIDE * (part - 1 / self.ranks) if part * self.ranks >= 2 else 0.0
        return MUST_DIVIDE

    def _price(self, param: Node, placement: Placement) -> float:
        """The price of a small matrix that is whole: part of a collective on what it computes."""
        if param not in self.search.little or isinstance(placement, Shard):
            return 0.0
        made = [self.search.bytes[n] for n, _ in self.search.uses[param] if n in self.options]
        return SMALL_PRICE * self.model.all_gather(min(made, default=0.0), self.ranks)

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


def _exact(costs: Sequence[float] | Sequence[Sequence[float]]) -> Table:
    """Costs as multiples of a tiny power of two: sums are then exact, in any order, and ties are ties."""
    return np.round(np.asarray(costs, dtype=float) * EXACT) / EXACT


def _passes_partial(strategy: Strategy) -> bool:
    return strategy.factor is None and any(isinstance(o, Partial) for o in strategy.outputs)


def _order(placement: Placement) -> tuple[int, Placement]:
    return [Replicate, Shard, Partial, Owned].index(type(placement)), placement


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

"""What every choice costs on one axis of the mesh, given what the axes before it left."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch.fx import Node

from ..factors import OpFactor, Place, producer
from ..placements import Partial, Placement, Shard, split_evenly
from ..rules.rule import Rule
from .assignment import Assignment
from .eliminate import Table
from .strategies import Strategy
from .weights import MUST_DIVIDE, SMALL_PRICE

if TYPE_CHECKING:
    from .search import Search

EXACT = 2.0**44
"""Costs are counted in units of 1 / EXACT seconds; sums of them are exact up to 512 s."""

# How much of its memory traffic an elementwise operator counts. More would let a large activation pay for
# statistics that are reduced by themselves: norms on a divided hidden dimension, with twice the collectives.
TIE_BREAK = 1e-4


class AxisCosts:
    """Cost tables of one axis.

    Args:
        search: the graph and the cost model.
        ranks: the size of the axis.
        prior: the decisions on the axes before it.
    """

    def __init__(self, search: Search, ranks: int, prior: Sequence[Assignment]) -> None:
        self.search, self.ranks, self.prior = search, ranks, prior
        self.model = search.cost_model
        self._tables: dict[Hashable, Table] = {}

    def conversions(self, src: list[Placement], dst: list[Placement], value: Node) -> Table:
        # A weight is never gathered: that would be another kind of parallelism, with its memory.
        weight = value in self.search.weights
        size = self.search.bytes[value] / self._earlier(value)
        rule = self.search.factors.rules.get(producer(value)[0])
        statistic = isinstance(rule, Rule) and bool(rule.reduce) and not rule.contraction

        key = (tuple(src), tuple(dst), size, weight, statistic)
        if key not in self._tables:
            self._tables[key] = exact(
                [[self._conversion(a, b, size, weight, statistic) for b in dst] for a in src]
            )
        return self._tables[key]

    def _conversion(self, a: Placement, b: Placement, size: float, weight: bool, statistic: bool) -> float:
        if weight and isinstance(a, Shard) and a != b:
            return math.inf
        return self.model.reshard(a, b, size, self.ranks, statistic=statistic)

    def times(self, node: Node, options: list[Strategy]) -> list[float]:
        """What each strategy of a node costs by itself."""
        earlier = math.prod(a.ranks for a in self.prior if a.nodes[node].factor)
        rule = self.search.factors.rules.get(node)
        if isinstance(rule, Rule) and rule.contraction:
            whole = self.search.quantities.operations(node) / self.model.flops / earlier
            return [whole * self._share(node, o) for o in options]
        # Elementwise work is fused: it breaks ties and no more. A partial value is reduced early.
        whole = TIE_BREAK * self.model.touch(self.search.bytes[node]) / earlier
        return [whole * self._share(node, o) + (1e-9 if _passes_partial(o) else 0.0) for o in options]

    def _share(self, node: Node, strategy: Strategy) -> float:
        """The share of a node's work that the fullest rank has."""
        return self._largest(self.left_in(node, strategy.factor)) if strategy.factor else 1.0

    def hold_cost(self, param: Node, placement: Placement) -> float:
        """Reading what a rank holds, and what is held against leaving a small matrix whole."""
        size = self.search.bytes[param] / self._earlier(param)
        if isinstance(placement, Shard):
            size *= self._largest(self.left(param, (placement.dim, placement.factor)))
        return self.model.touch(size) + self.price(param, placement)

    def penalty(self, param: Node, placement: Placement) -> float:
        """The price of a large matrix that is whole, or that half of the ranks or more have no part of."""
        if param not in self.search.large:
            return 0.0
        if isinstance(placement, Shard):
            part = self._largest(self.left(param, (placement.dim, placement.factor)))
            return MUST_DIVIDE * (part - 1 / self.ranks) if part * self.ranks >= 2 else 0.0
        return MUST_DIVIDE

    def price(self, param: Node, placement: Placement) -> float:
        """The price of a small matrix that is whole: part of a collective on what it computes."""
        if param not in self.search.little or isinstance(placement, Shard):
            return 0.0
        made = [self.search.bytes[n] for n, _ in self.search.uses[param] if n in self.search.bytes]
        return SMALL_PRICE * self.model.all_gather(min(made, default=0.0), self.ranks)

    def _largest(self, units: int) -> float:
        """The share of the units that the fullest rank gets."""
        return max(split_evenly(units, self.ranks)) / units

    # What earlier axes left.

    def left(self, param: Node, place: Place, atom: int | None = None) -> int:
        size = self.search.factors.size(
            atom if atom is not None else self.search.factors.places(param)[place]
        )
        assert isinstance(size, int)
        for assignment in self.prior:
            if assignment.params[param] == Shard(*place):
                size = -(-size // assignment.ranks)
        return size

    def left_in(self, node: Node, factor: OpFactor) -> int:
        size = factor.size
        assert isinstance(size, int)
        for assignment in self.prior:
            if assignment.nodes[node].factor == factor:
                size = -(-size // assignment.ranks)
        return size

    def _earlier(self, value: Node) -> float:
        return math.prod(a.ranks for a in self.prior if isinstance(a.output(value), Shard))


def exact(costs: Sequence[float] | Sequence[Sequence[float]]) -> Table:
    """Costs as multiples of a tiny power of two: sums are then exact, in any order, and ties are ties."""
    return np.round(np.asarray(costs, dtype=float) * EXACT) / EXACT


def _passes_partial(strategy: Strategy) -> bool:
    return strategy.factor is None and any(isinstance(o, Partial) for o in strategy.outputs)

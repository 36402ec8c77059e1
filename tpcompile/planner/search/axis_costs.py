"""What every choice on one axis of the mesh costs, together with what is decided on other axes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
from torch.fx import Node

from tpcompile.ir.conversions import steps
from tpcompile.ir.markers import Axes, Placements
from tpcompile.ir.nodes import producer
from tpcompile.ir.placements import Partial, Placement, Shard, split_evenly
from tpcompile.rules.assignment import Assignment
from tpcompile.rules.choices import Choice
from tpcompile.rules.factors import OpFactor, Place
from tpcompile.rules.rule import Rule

from .eliminate import Table
from .facts import Facts
from .must_divide import GATHERED, GATHERS, MUST_DIVIDE, SMALL_PRICE

EXACT = 2.0**44
"""Costs are counted in units of 1 / EXACT seconds; sums of them are exact up to 512 s."""

# How much of its memory traffic an elementwise operator counts. More would let a large activation pay for
# statistics that are reduced by themselves: norms on a divided hidden dimension, with twice the collectives.
TIE_BREAK = 1e-4

T = TypeVar("T")


class AxisCosts:
    """Cost tables of one axis: what all decided axes cost together, of which only this one's choice varies.

    Args:
        facts: the program and the cost model.
        others: the decisions on other axes.
        axis: where the axis stands among all.
        axis_sizes: the sizes of all.
    """

    def __init__(
        self, facts: Facts, others: Mapping[int, Assignment], axis: int, axis_sizes: Sequence[int]
    ) -> None:
        self.facts, self.ranks = facts, axis_sizes[axis]
        self.known, self.axis_sizes = sorted({*others, axis}), axis_sizes
        self.model = facts.cost_model
        self.others = [others[a] for a in sorted(others)]
        self.at = sum(a < axis for a in others)
        self.all_ranks = self.beside([a.ranks for a in self.others], self.ranks)
        self._tables: dict[Hashable, Table] = {}
        self._conversions: dict[Hashable, float] = {}

    def beside(self, others: Iterable[T], mine: T) -> tuple[T, ...]:
        """A choice on this axis in its place among those on the others."""
        found = list(others)
        return (*found[: self.at], mine, *found[self.at :])

    def conversions(
        self, src: list[Placement], dst: list[Placement], value: Node, others: tuple[Placements, Placements]
    ) -> Table:
        """The cost of bringing a value from each placement to each, as it is brought on the other axes."""
        weight = value in self.facts.weights
        rule = self.facts.factors.rules.get(producer(value)[0])
        statistic = isinstance(rule, Rule) and bool(rule.reduce) and not rule.contraction
        how = (self.facts.bytes[value], weight, statistic)
        key = (tuple(src), tuple(dst), others, how)
        if key not in self._tables:
            pairs = [[(self.beside(others[0], a), self.beside(others[1], b)) for b in dst] for a in src]
            self._tables[key] = exact([[self._conversion(a, b, *how) for a, b in row] for row in pairs])
        return self._tables[key]

    def _conversion(
        self, src: Placements, dst: Placements, size: float, weight: bool, statistic: bool
    ) -> float:
        key = (src, dst, size, weight, statistic)
        if key not in self._conversions:
            self._conversions[key] = self._convert(*key)
        return self._conversions[key]

    def _convert(self, src: Placements, dst: Placements, size: float, weight: bool, statistic: bool) -> float:
        """Seconds that the moves take which ``choose-collectives`` will insert."""
        for x, y in zip(src, dst, strict=True):
            if math.isinf(self.model.reshard(x, y, size, 2)):
                return math.inf
        total, now = 0.0, src
        for target, options, after in steps(src, dst):
            # A weight is never gathered: that would be another kind of parallelism, with its memory. Only a
            # call that finds it as another one wanted it has no choice. Sums over it are another matter.
            if weight and target in GATHERS:
                if not self.facts.later:
                    return math.inf
                total += GATHERED
            axes: Axes = options[0]
            ranks = math.prod(self.all_ranks[a] for a in axes)
            # What the moved axes have together.
            held = size / math.prod(
                self.all_ranks[a] for a, p in enumerate(now) if isinstance(p, Shard) and a not in axes
            )
            near = self._near(axes)
            total += self.model.reshard(now[axes[0]], after[axes[0]], held, ranks, near, statistic=statistic)
            now = after
        return total

    def _near(self, axes: Axes) -> int | None:
        """Of some of the axes that are decided, by their places among these."""
        return self.model.near([self.known[a] for a in axes], self.axis_sizes)

    def times(self, node: Node, options: list[Choice]) -> list[float]:
        """What each choice of a node costs by itself."""
        others = [a.nodes[node] for a in self.others]
        every = [self.beside(others, option) for option in options]
        rule = self.facts.factors.rules.get(node)
        if isinstance(rule, Rule) and rule.contraction:
            whole = self.facts.quantities.operations(node) / self.model.flops
            return [whole * self._share(each) for each in every]
        # Elementwise work is fused: it breaks ties and no more. A partial value is reduced early.
        whole = TIE_BREAK * self.model.touch(self.facts.bytes[node])
        return [whole * self._share(each) + 1e-9 * sum(map(_passes_partial, each)) for each in every]

    def _share(self, choices: Sequence[Choice]) -> float:
        """The share of a node's work that the fullest rank has."""
        units: dict[Hashable, object] = {s.factor: s.factor.size for s in choices if s.factor}
        return math.prod(part for _, part in self._parts([s.factor for s in choices], units))

    def _parts(
        self, divided: Sequence[Hashable | None], units: Mapping[Hashable, object]
    ) -> Iterator[tuple[int, float]]:
        """Per axis that divides something: its size, and the share of the fullest of its ranks."""
        left: dict[Hashable, int] = {}
        for what, ranks in zip(divided, self.all_ranks, strict=True):
            if what is not None:
                size = left.get(what, units[what])
                assert isinstance(size, int)
                left[what] = split_evenly(size, ranks)[0]
                yield ranks, left[what] / size

    def hold_cost(self, param: Node, placement: Placement) -> float:
        """Reading what a rank holds, and what is held against leaving a small matrix whole."""
        share = math.prod(part for _, part in self._held(param, placement))
        return self.model.touch(self.facts.bytes[param] * share) + self.price(param, placement)

    def penalty(self, param: Node, placement: Placement) -> float:
        """The price of a large matrix that is whole, or that half of the ranks or more have no part of."""
        if param not in self.facts.large:
            return 0.0
        held = list(self._held(param, placement))
        short = math.fsum(part - 1 / ranks for ranks, part in held if part * ranks >= 2)
        return MUST_DIVIDE * (len(self.all_ranks) - len(held) + short)

    def price(self, param: Node, placement: Placement) -> float:
        """The price of a small matrix that is whole: part of a collective on what it computes."""
        if param not in self.facts.little:
            return 0.0
        made = [self.facts.bytes[n] for n, _ in self.facts.uses[param] if n in self.facts.bytes]
        placements = self._placements(param, placement)
        whole = [n for n, p in zip(self.all_ranks, placements, strict=True) if not isinstance(p, Shard)]
        # Divided on some axes, that share of it which a rank holds beyond its part of the whole.
        ranks, copies = math.prod(self.all_ranks), math.prod(whole)
        near = self._near(tuple(range(len(self.known))))
        gather = self.model.all_gather(min(made, default=0.0), ranks, near)
        return SMALL_PRICE * gather * (copies - 1) / (ranks - 1) if ranks > 1 else 0.0

    def _placements(self, param: Node, placement: Placement) -> Placements:
        return self.beside([a.params[param] for a in self.others], placement)

    def _held(self, param: Node, placement: Placement) -> Iterator[tuple[int, float]]:
        places = self.facts.factors.places(param)
        divided = [
            (p.dim, p.factor) if isinstance(p, Shard) else None for p in self._placements(param, placement)
        ]
        return self._parts(
            divided, {place: self.facts.factors.size(places[place]) for place in divided if place}
        )

    # What other axes leave.

    def left(self, param: Node, place: Place, atom: int) -> int:
        """The units of a parameter that one rank of all the other axes may have."""
        return self._left(
            self.facts.factors.size(atom), [a.params[param] == Shard(*place) for a in self.others]
        )

    def left_in(self, node: Node, factor: OpFactor, *, fewest: bool = False) -> int:
        """The units of a factor of a call that one rank of all the other axes may have, or has at least."""
        return self._left(factor.size, [a.nodes[node].factor == factor for a in self.others], fewest)

    def _left(self, size: object, dividing: Iterable[bool], fewest: bool = False) -> int:
        assert isinstance(size, int)
        for assignment, divides in zip(self.others, dividing, strict=True):
            if divides:
                size = split_evenly(size, assignment.ranks)[-1 if fewest else 0]
        return size


def exact(costs: Sequence[float] | Sequence[Sequence[float]]) -> Table:
    """Costs as multiples of a tiny power of two: sums are then exact, in any order, and ties are ties."""
    return np.round(np.asarray(costs, dtype=float) * EXACT) / EXACT


def _passes_partial(choice: Choice) -> bool:
    return choice.factor is None and any(isinstance(o, Partial) for o in choice.outputs)

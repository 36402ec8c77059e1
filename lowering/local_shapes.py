"""Sizes of values on one rank, from their factors and placements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from tpcompile.ir.markers import Axes, Placements, origin
from tpcompile.ir.placements import Filled, Placement, Shard, split_evenly
from tpcompile.ir.sizes import Size
from tpcompile.ir.torch_internals import CeilDiv
from tpcompile.rules.factors import Factors


@dataclass(frozen=True)
class LocalShapes:
    """What one rank holds.

    Attributes:
        factors: the factors of the graph's values.
        axis_sizes: the sizes of the sub-axes.
        coordinates: the rank's position on each.
    """

    factors: Factors
    axis_sizes: tuple[int, ...]
    coordinates: tuple[int, ...]

    def atoms(self, value: Node, placements: Sequence[Placement]) -> list[list[Size]]:
        """The sizes of the factors of every dimension that this rank holds."""
        found = [list(dim) for dim in self.factors.atom_sizes(origin(value))]
        for ranks, at, placement in zip(self.axis_sizes, self.coordinates, placements, strict=True):
            if isinstance(placement, Shard):
                size = found[placement.dim][placement.factor]
                assert isinstance(size, int), "only static sizes are divided"
                found[placement.dim][placement.factor] = split_evenly(size, ranks)[at]
        for placement in {p for p in placements if isinstance(p, Filled)}:
            whole, ranks = _product(found[placement.dim]), self.sharing(placements, placement)
            found[placement.dim] = [-(-whole // ranks) if isinstance(whole, int) else CeilDiv(whole, ranks)]
        return found

    def sharing(self, placements: Sequence[Placement], placement: Placement) -> int:
        """How many ranks the axes have that place a value in this way."""
        return math.prod(n for n, p in zip(self.axis_sizes, placements, strict=True) if p == placement)

    def shape(self, value: Node, placements: Sequence[Placement]) -> list[Size]:
        """The local shape."""
        return [_product(dim) for dim in self.atoms(value, placements)]

    def start(self, value: Node, placements: Sequence[Placement], place: Shard) -> int:
        """The first position of the divided factor that this rank holds."""
        size = self.factors.atom_sizes(origin(value))[place.dim][place.factor]
        assert isinstance(size, int)
        first = 0
        for ranks, at, placement in zip(self.axis_sizes, self.coordinates, placements, strict=True):
            if placement == place:
                sizes = split_evenly(size, ranks)
                first, size = first + sum(sizes[:at]), sizes[at]
        return first

    def parts(self, value: Node, placements: Sequence[Placement], place: Shard, axes: Axes) -> list[int]:
        """How much of a factor each member of the group over ``axes`` holds, in the group's order.

        ``axes`` are the innermost ones that divide the factor; other coordinates are this rank's.
        """
        size = self.factors.atom_sizes(origin(value))[place.dim][place.factor]
        assert isinstance(size, int)
        sizes = [size]
        for a, (ranks, at, placement) in enumerate(
            zip(self.axis_sizes, self.coordinates, placements, strict=True)
        ):
            if placement == place:
                parts = [split_evenly(s, ranks) for s in sizes]
                sizes = [p for part in parts for p in part] if a in axes else [part[at] for part in parts]
        return sizes

    def minor(self, value: Node, placements: Placements, place: Shard) -> int:
        """The local size of everything inside the factor's dimension that is minor to it."""
        product = self.inside(value, placements, place)
        assert isinstance(product, int)
        return product

    def inside(self, value: Node, placements: Placements, place: Shard) -> Size:
        """As ``minor``, but it may be dynamic."""
        return _product(self.atoms(value, placements)[place.dim][place.factor + 1 :])

    def outside(self, value: Node, placements: Placements, place: Shard) -> Size:
        """The local size of everything in the factor's dimension that is major to it."""
        return _product(self.atoms(value, placements)[place.dim][: place.factor])


def _product(sizes: Sequence[Size]) -> Size:
    return math.prod(sizes) if sizes else 1

"""A part of a parameter that is placed by itself: a box cut out of it, then divided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tpcompile.ir.placements import split_evenly

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Segment:
    """A part of a parameter that is placed by itself: a box cut out of it, then divided.

    Attributes:
        factors: per dimension of the parameter the sizes of its factors, major first.
        box: per factor (flat, in the same order) the range that belongs to the segment.
        atoms: per dimension of the segment the sizes of its own factors.
        shards: per mesh axis the flat index of the divided atom, or None where the segment is whole.
    """

    factors: tuple[tuple[int, ...], ...]
    box: Box
    atoms: tuple[tuple[int, ...], ...]
    shards: tuple[int | None, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The segment's shape, before it is divided."""
        return _shape(self.factors, self.box)

    def place(self, axis: int) -> tuple[int, int] | None:
        """The dimension that a mesh axis divides, and the position of the divided atom in it."""
        atom = self.shards[axis]
        if atom is None:
            return None
        flat = [(dim, at) for dim, atoms in enumerate(self.atoms) for at in range(len(atoms))]
        return flat[atom]

    def local_box(self, axis_sizes: Sequence[int], coordinates: Sequence[int]) -> Box:
        """The ranges of atoms that the rank at these coordinates holds; axes divide one after the other."""
        box = [(0, a) for dim in self.atoms for a in dim]
        for ranks, at, atom in zip(axis_sizes, coordinates, self.shards, strict=True):
            if atom is not None:
                start, stop = box[atom]
                sizes = split_evenly(stop - start, ranks)
                start += sum(sizes[:at])
                box[atom] = (start, start + sizes[at])
        return tuple(box)

    def local_shape(self, box: Box) -> tuple[int, ...]:
        """The shape of the part that a local box names."""
        return _shape(self.atoms, box)

    def take(self, full: Tensor, box: Box) -> Tensor:
        """Cuts a rank's part out of the whole parameter (a view where strides allow, else a copy)."""
        segment = _cut(full.reshape(_flat(self.factors)), self.box).reshape(_flat(self.atoms))
        return _cut(segment, box).reshape(self.local_shape(box))

    def put(self, full: Tensor, parts: Sequence[tuple[Box, Tensor]]) -> None:
        """Writes the parts of all ranks into the whole parameter, in place."""
        segment = full.new_empty(_flat(self.atoms))
        for box, part in parts:
            _cut(segment, box).copy_(part.reshape([stop - start for start, stop in box]))
        target = _cut(full.view(_flat(self.factors)), self.box)
        target.copy_(segment.reshape(target.shape))


def whole_segment(shape: Sequence[int], axis_count: int) -> Segment:
    """The segment that is the whole parameter, divided nowhere."""
    factors = tuple((int(s),) for s in shape)
    return Segment(factors, tuple((0, int(s)) for s in shape), factors, (None,) * axis_count)


def _flat(factors: tuple[tuple[int, ...], ...]) -> list[int]:
    return [f for dim in factors for f in dim]


def _shape(factors: tuple[tuple[int, ...], ...], box: Box) -> tuple[int, ...]:
    lengths = iter(stop - start for start, stop in box)
    return tuple(math.prod(next(lengths) for _ in dim) for dim in factors)


def _cut(view: Tensor, box: Box) -> Tensor:
    for i, (start, stop) in enumerate(box):
        view = view.narrow(i, start, stop - start)
    return view

"""The boxes of a whole parameter that a rank holds, and where they are in its local tensor.

A segment is a box in the parameter seen as the product of its factors, divided as the product of its atoms
(see ``layout``). Both products are per dimension, so what a rank holds of a segment is a product too: of runs
along each dimension, which a row-major walk over the rank's atoms meets in the parameter's own order. Two
runs of one dimension never touch, hence no box can be joined with another of its segment; boxes of different
segments can (an interleaved ``[gate up]`` is whole again where both are divided alike).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from .segment import Segment

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, order=True)
class Run:
    """Indices of one dimension that follow each other in the whole parameter and in the local tensor.

    Attributes:
        start: the first one, in the whole parameter.
        at: the first one, in the local tensor.
        length: how many.
    """

    start: int
    at: int
    length: int

    def meets(self, other: Run) -> bool:
        """Whether the other follows this one in the whole parameter."""
        return self.start + self.length == other.start

    def continues(self, other: Run) -> bool:
        """Whether the other follows this one in the local tensor as well."""
        return self.meets(other) and self.at + self.length == other.at


@dataclass(frozen=True)
class Range:
    """A box of the whole parameter that is a box of the local tensor.

    Attributes:
        offsets: where it begins in the whole parameter.
        sizes: its shape.
        where: the slices of the local tensor.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    where: tuple[slice, ...]


@dataclass(frozen=True)
class PiecedBox:
    """A box of the whole parameter that a rank holds, perhaps in several pieces along one dimension.

    Attributes:
        offsets: where it begins in the whole parameter.
        sizes: its shape.
        starts: where it begins in the local tensor; along ``dim`` the first piece.
        dim: the dimension of the pieces.
        pieces: the runs along ``dim``, in the order of the whole parameter.
        copies: the axes of the mesh along which every rank holds the same box.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    dim: int
    pieces: tuple[Run, ...]
    copies: tuple[int, ...]

    def ranges(self) -> Iterator[Range]:
        """The box's pieces, as boxes of the local tensor."""
        for piece in self.pieces or (None,):
            offsets, sizes, starts = list(self.offsets), list(self.sizes), list(self.starts)
            if piece is not None:
                offsets[self.dim], sizes[self.dim], starts[self.dim] = piece.start, piece.length, piece.at
            where = tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))
            yield Range(tuple(offsets), tuple(sizes), where)


def pieced_boxes(
    shape: tuple[int, ...],
    segments: Sequence[Segment],
    dim: int,
    axis_sizes: Sequence[int],
    at: Sequence[int],
) -> list[PiecedBox]:
    """The fewest boxes that make up what the rank at these coordinates holds of a parameter.

    Args:
        shape: the shape of the whole parameter.
        segments: its segments, and
        dim: the dimension in which they differ.
        axis_sizes: the sizes of the sub-axes.
        at: the rank's coordinates on them.

    Segments that are copied along different axes are kept apart, so that boxes of two ranks are the same
    or have nothing in common. A parameter without elements is one empty box.
    """
    zeros = (0,) * len(shape)
    if 0 in shape:
        return [PiecedBox(zeros, shape, zeros, 0, (), tuple(range(len(axis_sizes))))]
    if not shape:
        return [PiecedBox((), (), (), 0, (), copied_along(segments[0], axis_sizes))]
    position = 0
    packed: dict[tuple[tuple[int, ...], tuple[tuple[Run, ...], ...]], list[Run]] = {}
    for segment in segments:
        runs = segment_runs(segment, segment.local_box(axis_sizes, at))
        key = copied_along(segment, axis_sizes), runs[:dim] + ((Run(0, 0, 1),),) + runs[dim + 1 :]
        moved = [Run(r.start, r.at + position, r.length) for r in runs[dim]]
        packed.setdefault(key, []).extend(moved)
        position += sum(r.length for r in runs[dim])
    found = [
        _pieced_box(chosen, dim, pieces, copies)
        for (copies, others), moved in packed.items()
        for pieces in _touching(moved)
        for chosen in itertools.product(*others)
    ]
    return sorted(found, key=lambda r: r.offsets)


def copied_along(segment: Segment, axis_sizes: Sequence[int]) -> tuple[int, ...]:
    """The axes of more than one rank that do not divide a segment."""
    return tuple(
        i
        for i, (n, atom) in enumerate(zip(axis_sizes, segment.shards, strict=True))
        if n > 1 and atom is None
    )


def _pieced_box(runs: Sequence[Run], dim: int, pieces: tuple[Run, ...], copies: tuple[int, ...]) -> PiecedBox:
    """One box, from a run per dimension, except along ``dim``."""
    length = sum(p.length for p in pieces)
    own = [Run(pieces[0].start, pieces[0].at, length) if d == dim else r for d, r in enumerate(runs)]
    offsets, starts, sizes = (tuple(getattr(r, key) for r in own) for key in ("start", "at", "length"))
    return PiecedBox(offsets, sizes, starts, dim, pieces, copies)


def _touching(runs: Sequence[Run]) -> Iterator[tuple[Run, ...]]:
    """Runs grouped into those that follow each other in the whole parameter; joined where locally they do."""
    group: list[Run] = []
    for run in sorted(runs):
        if group and group[-1].continues(run):
            group[-1] = Run(group[-1].start, group[-1].at, group[-1].length + run.length)
        elif group and group[-1].meets(run):
            group.append(run)
        else:
            if group:
                yield tuple(group)
            group = [run]
    if group:
        yield tuple(group)


def segment_runs(segment: Segment, box: Spans) -> tuple[tuple[Run, ...], ...]:
    """Per dimension the runs of a segment's part."""
    cut, local = iter(segment.box), iter(box)
    return tuple(
        _runs(factors, tuple(next(cut) for _ in factors), atoms, tuple(next(local) for _ in atoms))
        for factors, atoms in zip(segment.factors, segment.atoms, strict=True)
    )


@lru_cache(maxsize=4096)
def _runs(factors: tuple[int, ...], cut: Spans, atoms: tuple[int, ...], local: Spans) -> tuple[Run, ...]:
    """The runs of one dimension: a box of atoms of a box of factors.

    Both are runs in row-major order, the first in the segment, the second in the whole dimension; what
    their ends divide remains.
    """
    whole = list(_row_major(factors, cut))
    found, i, passed, at = [], 0, 0, 0  # run i of the whole begins at index `passed` of the segment
    for start, length in _row_major(atoms, local):
        stop = start + length
        while start < stop:
            while passed + whole[i][1] <= start:
                passed += whole[i][1]
                i += 1
            taken = min(stop, passed + whole[i][1]) - start
            found.append(Run(whole[i][0] + start - passed, at, taken))
            start, at = start + taken, at + taken
    return tuple(found)


def _row_major(sizes: Sequence[int], box: Spans) -> Iterator[tuple[int, int]]:
    """The longest runs (start and length) of a box, in the row-major order of sizes."""
    if any(stop == start for start, stop in box):
        return
    inner, last = 1, len(sizes)
    while last and box[last - 1] == (0, sizes[last - 1]):
        last -= 1
        inner *= sizes[last]
    if not last:
        yield 0, inner
        return
    start, stop = box[last - 1]
    strides = [inner * math.prod(sizes[d + 1 : last]) for d in range(last - 1)]
    for outer in itertools.product(*(range(a, b) for a, b in box[: last - 1])):
        base = sum(i * s for i, s in zip(outer, strides, strict=True))
        yield base + start * inner, (stop - start) * inner

"""Where the elements of a box lie after a reshape: dimensions are merged and taken apart in groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

_MOST_PIECES = 512  # of one box; beyond that whole rows are taken, and cut afterwards


class Group(NamedTuple):
    """Neighbouring dimensions of a tensor, and those that a reshape makes of them: as many elements."""

    before: slice
    after: slice


def groups(before: Sequence[int], after: Sequence[int]) -> list[Group]:
    """The smallest groups of dimensions that a reshape keeps apart.

    Args:
        before: a shape without zeros.
        after: another one with as many elements.
    """
    found: list[Group] = []
    i = j = 0
    while i < len(before) or j < len(after):
        first = (i, j)
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while (p := math.prod(before[first[0] : i])) != (q := math.prod(after[first[1] : j])):
            i, j = (i + 1, j) if p < q else (i, j + 1)
        found.append(Group(slice(first[0], i), slice(first[1], j)))
    return found


@dataclass(frozen=True)
class Piece:
    """A part of a box of the reshaped tensor, and the box of the other that holds it.

    Attributes:
        target: where the part begins in the box, per dimension.
        sizes: its shape.
        offsets: where the other box begins.
        cover: the other box's shape; its elements are a run in their order.
        start: where the part's run begins in that one.
        rows: the shape of that run; where it is larger than the part, the part is cut out of it.
        inside: where the part begins in it.
    """

    target: tuple[int, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]
    cover: tuple[int, ...]
    start: int
    rows: tuple[int, ...]
    inside: tuple[int, ...]

    def cut(self, made: Tensor, dim: int) -> Tensor:
        """Makes the part's dimensions of one, ``dim``, that holds the elements of the cover."""
        run = made.narrow(dim, self.start, math.prod(self.rows))
        run = run.reshape([*made.shape[:dim], *self.rows, *made.shape[dim + 1 :]])
        for i, (start, size) in enumerate(zip(self.inside, self.sizes, strict=True)):
            run = run.narrow(dim + i, start, size)
        return run


def pieces(
    before: Sequence[int], after: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]
) -> Iterator[Piece]:
    """The pieces of a box, for one group of dimensions.

    Args:
        before: the group's shape.
        after: its shape after the reshape.
        offsets: where the box begins, after the reshape.
        sizes: its shape, without zeros.
    """
    at = next((d for d in reversed(range(len(after))) if sizes[d] != after[d]), 0)
    while math.prod(sizes[:at]) > _MOST_PIECES:
        at -= 1
    inner = math.prod(after[at + 1 :])
    rows = (1,) * at + tuple(sizes[at : at + 1]) + tuple(after[at + 1 :])
    inside = (0,) * len(after[: at + 1]) + tuple(offsets[at + 1 :])
    part = (1,) * at + tuple(sizes[at:])
    for index in itertools.product(*(range(size) for size in sizes[:at])):
        first = 0
        for d, i in enumerate((*index, *(0 for _ in after[at : at + 1]))):
            first = first * after[d] + offsets[d] + i
        first *= inner
        begin, cover, start = _cover(before, first, first + math.prod(rows))
        target = index + (0,) * len(after[at:])
        yield Piece(target, part, begin, cover, start, rows, inside)


def _cover(shape: Sequence[int], first: int, stop: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """The smallest box whose elements are a run that has those from ``first`` to ``stop``, in their order."""
    low, high = _index(shape, first), _index(shape, stop - 1)
    at = next((d for d in range(len(shape)) if low[d] != high[d]), len(shape))
    offsets = tuple(i if d <= at else 0 for d, i in enumerate(low))
    cover = tuple(high[d] - low[d] + 1 if d <= at else size for d, size in enumerate(shape))
    begin = 0
    for size, i in zip(shape, offsets, strict=True):
        begin = begin * size + i
    return offsets, cover, first - begin


def _index(shape: Sequence[int], position: int) -> list[int]:
    found = []
    for size in reversed(shape):
        position, i = divmod(position, size)
        found.append(i)
    return found[::-1]

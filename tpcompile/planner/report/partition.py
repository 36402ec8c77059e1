"""Which ranks hold which part of a parameter, as rectangles of the whole."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tpcompile.errors import TpCompileError
from tpcompile.ir.layout.index_ranges import segment_runs
from tpcompile.ir.layout.weight_layout import ParamLayout, WeightLayout

MOST_CELLS = 256
"""More rectangles than anybody can tell apart are not drawn."""


@dataclass(frozen=True)
class Cell:
    """A part of a parameter: from and to which row and column, and the ranks that hold it."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Partition:
    """A parameter as a rectangle.

    Attributes:
        dims: the dimensions that are its rows and its columns; None for one that there is not.
        size: how many rows and columns it has.
        cells: its parts.
        rows: where segments of a packed parameter border on each other, if they are rows, or
        columns: if they are columns.
        ranks: how many ranks hold it.
        drawn: how many of them, from the first on, are in the cells; fewer if there would be too many.
    """

    dims: tuple[int | None, int | None]
    size: tuple[int, int]
    cells: tuple[Cell, ...]
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()
    ranks: int = 1
    drawn: int = 1


def partition_of(layout: WeightLayout, name: str) -> Partition | None:
    """How a parameter is divided; None where a custom strategy holds parts that are not boxes of it."""
    param = layout.params[name]
    try:
        dims = _dims(layout, name)
        cells, drawn = _cells(layout, name, dims)
    except TpCompileError:  # the strategy cannot say
        return None
    size = (_size(param, dims[0]), _size(param, dims[1]))
    borders = _borders(param)
    rows, columns = ((borders if dim == param.packed_dim else ()) for dim in dims)
    return Partition(dims, size, cells, rows, columns, layout.ranks, drawn)


def _size(param: ParamLayout, dim: int | None) -> int:
    return 1 if dim is None else param.shape[dim]


def _dims(layout: WeightLayout, name: str) -> tuple[int | None, int | None]:
    """The dimensions to draw: those that are divided, and the last ones."""
    shape = layout.params[name].shape
    if len(shape) < 2:
        return None, 0 if shape else None
    parts = layout.ranges(name, 0)
    divided = [d for d in range(len(shape)) if any(p.sizes[d] < shape[d] for p in parts)]
    chosen = list(dict.fromkeys([*divided, *reversed(range(len(shape)))]))[:2]
    return min(chosen), max(chosen)


def _cells(
    layout: WeightLayout, name: str, dims: tuple[int | None, int | None]
) -> tuple[tuple[Cell, ...], int]:
    """The parts of the ranks, and of how many ranks they are."""
    found: dict[tuple[tuple[int, int], tuple[int, int]], list[int]] = {}
    for rank in range(layout.ranks):
        parts = layout.ranges(name, rank)
        places = {
            tuple((0, 1) if d is None else (p.offsets[d], p.offsets[d] + p.sizes[d]) for d in dims)
            for p in parts
            if math.prod(p.sizes)
        }
        if rank and len(found.keys() | places) > MOST_CELLS:
            return _as_cells(found), rank
        for rows, columns in sorted(places)[:MOST_CELLS]:
            found.setdefault((rows, columns), []).append(rank)
    return _as_cells(found), layout.ranks


def _as_cells(found: dict[tuple[tuple[int, int], tuple[int, int]], list[int]]) -> tuple[Cell, ...]:
    return tuple(Cell(rows, columns, tuple(ranks)) for (rows, columns), ranks in sorted(found.items()))


def _borders(param: ParamLayout) -> tuple[int, ...]:
    """Where one segment ends and the next begins, along the dimension in which they differ."""
    if len(param.segments) < 2:
        return ()
    ends = set()
    for segment in param.segments:
        whole = tuple((0, a) for dim in segment.atoms for a in dim)
        for run in segment_runs(segment, whole)[param.packed_dim]:
            ends |= {run.start, run.start + run.length}
    return tuple(sorted(ends - {0, param.shape[param.packed_dim]}))[:MOST_CELLS]

"""Learns which elements of a parameter a custom strategy gives to a rank, by partitioning indices.

A partition that only chooses elements does to indices what it does to values. It is asked about each
dimension's index in its place, ascending and descending: whoever computes with values, rather than choosing
among them, answers these two differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tpcompile.errors import TpCompileError
from tpcompile.ir.layout.index_ranges import segment_runs
from tpcompile.ir.layout.segment import Segment, whole_segment
from tpcompile.ir.layout.selection import Runs, Selection
from tpcompile.ir.layout.weight_layout import ParamLayout, WeightLayout, whole_layout

from .custom_strategy import CustomStrategy

_EXACT = 1 << 24
"""Integers up to here are numbers of float32."""


@dataclass(frozen=True)
class RankPart:
    """What one rank holds of a parameter.

    Attributes:
        shape: the local shape.
        runs: per dimension the indices that it holds, or None if it holds no rows and columns.
        placements: of the DTensor that the strategy makes of it, or None if it makes a plain tensor.
    """

    shape: tuple[int, ...]
    runs: tuple[Runs, ...] | None
    placements: tuple[Any, ...] | None


def probe(strategy: CustomStrategy, param: Tensor, param_type: str, rank: int, mesh: DeviceMesh) -> RankPart:
    """A rank's part of a parameter.

    Raises:
        TpCompileError: the strategy cannot partition it.
    """
    with torch.no_grad():
        part = strategy.partition(param.detach(), param_type, rank, mesh)
        placements = tuple(part.placements) if isinstance(part, DTensor) else None
        shape = tuple(local_of(part).shape)
        return RankPart(shape, _find_runs(strategy, param, param_type, rank, mesh, shape), placements)


def local_of(part: Tensor) -> Tensor:
    """A rank's own tensor of a partitioned parameter."""
    return part.to_local() if isinstance(part, DTensor) else part


def _find_runs(
    strategy: CustomStrategy,
    param: Tensor,
    param_type: str,
    rank: int,
    mesh: DeviceMesh,
    shape: tuple[int, ...],
) -> tuple[Runs, ...] | None:
    if len(shape) != param.ndim:
        return None
    device = torch.device("cpu") if param.device.type == "meta" else param.device
    found = []
    for dim, size in enumerate(param.shape):
        dtype = torch.float32 if size <= _EXACT else torch.float64
        up = torch.arange(size, dtype=dtype, device=device)
        held = []
        for numbers in (up, size - 1 - up):
            whole = numbers.reshape([-1 if d == dim else 1 for d in range(param.ndim)]).expand(param.shape)
            try:
                held.append(local_of(strategy.partition(whole, param_type, rank, mesh)))
            except TpCompileError:
                return None  # it works for the parameter's own type only
        own = _along(held[0], dim, shape, size)
        if own is None or not torch.equal(held[0], size - 1 - held[1]):
            return None
        found.append(_runs(own))
    return tuple(found)


def _along(held: Tensor, dim: int, shape: tuple[int, ...], size: int) -> list[int] | None:
    """The indices along a dimension, if they depend on nothing else."""
    if tuple(held.shape) != shape:
        return None
    if held.numel() == 0:
        return list(range(size)) if shape[dim] == size else [] if shape[dim] == 0 else None
    own = held[tuple(slice(None) if d == dim else slice(0, 1) for d in range(held.ndim))]
    if not torch.equal(held, own.expand(shape)):
        return None
    indices = own.flatten().tolist()
    whole = all(i == int(i) and 0 <= i < size for i in indices)
    return [int(i) for i in indices] if whole else None


def _runs(indices: Sequence[int]) -> Runs:
    found: list[tuple[int, int]] = []
    for i in indices:
        if found and i == found[-1][0] + found[-1][1]:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((i, 1))
    return tuple(found)


def layout_from(
    name: str, tensor: Tensor, axis_sizes: tuple[int, ...], parts: Sequence[RankPart], strategy: str
) -> ParamLayout:
    """The layout that follows from what each rank holds: an ordinary one, where segments can say it."""
    layout = whole_layout(name, tensor, len(axis_sizes))
    if all(p.runs is not None for p in parts):
        for segment in _segments(layout.shape, axis_sizes, parts):
            if _describes(segment, axis_sizes, parts):
                return ParamLayout(name, layout.shape, layout.dtype, (segment,))
    runs = [p.runs for p in parts if p.runs is not None]
    known = tuple(runs) if len(runs) == len(parts) else None
    selection = Selection(strategy, tuple(p.shape for p in parts), known)
    return ParamLayout(name, layout.shape, layout.dtype, layout.segments, selection=selection)


def _segments(
    shape: tuple[int, ...], axis_sizes: tuple[int, ...], parts: Sequence[RankPart]
) -> list[Segment]:
    """Ways to hold the parameter that the compiler knows: whole, one dimension divided, or packed blocks."""
    whole = whole_segment(shape, len(axis_sizes))
    found = [whole]
    for dim, size in enumerate(shape):
        blocks = len(parts[0].runs[dim]) if parts[0].runs else 0
        if blocks and size % blocks == 0:
            atoms: list[tuple[int, ...]] = [(s,) for s in shape]
            atoms[dim] = (blocks, size // blocks) if blocks > 1 else (size,)
            flat = dim + (blocks > 1)
            found.append(Segment(whole.factors, whole.box, tuple(atoms), (flat,) * len(axis_sizes)))
    return found


def _describes(segment: Segment, axis_sizes: tuple[int, ...], parts: Sequence[RankPart]) -> bool:
    layout = WeightLayout(axis_sizes, {})
    for rank, part in enumerate(parts):
        runs = segment_runs(segment, segment.local_box(axis_sizes, layout.coordinates(rank)))
        if tuple(tuple((r.start, r.length) for r in dim) for dim in runs) != part.runs:
            return False
    return True

"""What a placement means, on real tensors: a whole value cut for all ranks, and put together again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpcompile.ir.nodes import has_fractions
from tpcompile.ir.placements import Filled, Owned, Partial, Placement, Replicate, Shard, split_evenly

from .compare import agree

Atoms = Sequence[Sequence[int]]
"""Per dimension of a value the sizes of its factors, major first."""


class RanksDiffer(Exception):
    """What should be the same on several ranks is not."""


class Unknown(Exception):
    """How a value is put together does not follow from its placement alone."""


def lay_out(
    value: Tensor, layout: Atoms, axis_sizes: tuple[int, ...], placements: Sequence[Placement]
) -> list[Tensor]:
    """What each rank holds of a value; where it is a sum, the summands are random."""
    pieces = [(value, [list(d) for d in layout])]
    for ranks, placement in zip(axis_sizes, placements, strict=True):
        pieces = [part for piece in pieces for part in _cut(*piece, ranks, placement)]
    return [piece.clone(memory_format=torch.contiguous_format) for piece, _ in pieces]


def _cut(
    value: Tensor, atoms: list[list[int]], ranks: int, placement: Placement
) -> list[tuple[Tensor, list[list[int]]]]:
    if isinstance(placement, Replicate):
        return [(value, atoms)] * ranks
    if isinstance(placement, Partial):
        return [(s, atoms) for s in summands(value, ranks)]
    if not isinstance(placement, Shard):
        raise Unknown(str(placement))
    out = []
    flat = _opened(value, atoms)
    at = sum(len(d) for d in atoms[: placement.dim]) + placement.factor
    for part in flat.split(list(split_evenly(atoms[placement.dim][placement.factor], ranks)), at):
        inside = [list(d) for d in atoms]
        inside[placement.dim][placement.factor] = part.shape[at]
        out.append((part.reshape([math.prod(d) for d in inside]), inside))
    return out


def summands(value: Tensor, ranks: int) -> list[Tensor]:
    """Random tensors that add up to a value."""
    if has_fractions(value):
        found = [torch.randn_like(value) for _ in range(ranks - 1)]
    else:
        found = [torch.randint_like(value, -9, 9) for _ in range(ranks - 1)]
    return [*found, value - sum(found)] if found else [value]


def _opened(value: Tensor, atoms: Atoms) -> Tensor:
    return value.reshape([a for d in atoms for a in d])


def put_together(
    parts: Sequence[Tensor],
    layout: Atoms,
    axis_sizes: tuple[int, ...],
    placements: Sequence[Placement],
    tolerance: float = 1e-10,
) -> Tensor:
    """The whole value from what the ranks hold.

    Raises:
        RanksDiffer: what several ranks hold is not the same.
        Unknown: rows belong to experts, or the parts are not of the sizes that the placement says.
    """
    if any(isinstance(p, Owned) for p in placements):
        raise Unknown("rows of experts")
    atoms = [list(d) for d in layout]
    for placement in placements:
        if isinstance(placement, Filled):
            atoms[placement.dim] = [parts[0].shape[placement.dim]]
    try:
        return _join(list(parts), atoms, list(zip(axis_sizes, placements, strict=True)), tolerance)
    except RuntimeError as error:  # of torch: sizes that do not fit
        raise Unknown(str(error)) from error


def _join(
    parts: list[Tensor], atoms: list[list[int]], todo: list[tuple[int, Placement]], tolerance: float
) -> Tensor:
    if not todo:
        return parts[0]
    (ranks, placement), *rest = todo
    size = len(parts) // ranks
    chunks = [parts[i * size : (i + 1) * size] for i in range(ranks)]
    if isinstance(placement, Filled):
        return torch.cat([_join(c, atoms, rest, tolerance) for c in chunks], placement.dim)
    if not isinstance(placement, Shard):
        return _reduced([_join(c, atoms, rest, tolerance) for c in chunks], placement, tolerance)
    opened = []
    at = sum(len(d) for d in atoms[: placement.dim]) + placement.factor
    units = split_evenly(atoms[placement.dim][placement.factor], ranks)
    for chunk, count in zip(chunks, units, strict=True):
        inside = [list(d) for d in atoms]
        inside[placement.dim][placement.factor] = count
        opened.append(_opened(_join(chunk, inside, rest, tolerance), inside))
    return torch.cat(opened, at).reshape([math.prod(d) for d in atoms])


def _reduced(wholes: list[Tensor], placement: Placement, tolerance: float) -> Tensor:
    if isinstance(placement, Partial):
        stacked = torch.stack(wholes)
        if placement.op == "sum":
            return stacked.sum(0).to(wholes[0].dtype)
        return stacked.amax(0) if placement.op == "max" else stacked.amin(0)
    for rank, other in enumerate(wholes[1:], 1):
        if not agree(other, wholes[0], tolerance):
            raise RanksDiffer(f"it should be the same on ranks that hold it whole, part {rank} is another")
    return wholes[0]


def sizes_at(value: Tensor, atoms: Sequence[Sequence[Any]]) -> list[list[int]]:
    """The factors of a value that is there: a dynamic one has the size that is left for it.

    Raises:
        Unknown: several in one dimension are dynamic.
    """
    found = []
    for size, dim in zip(value.shape, atoms, strict=True):
        known: list[int] = [int(a) for a in dim if isinstance(a, int)]
        product = math.prod(known)
        dynamic = len(dim) - len(known)
        if dynamic == 0 and product == size:
            found.append(known)
        elif not dim or (dynamic and not known):
            found.append([size])
        elif dynamic == 1 and product and size % product == 0:
            found.append([int(a) if isinstance(a, int) else size // product for a in dim])
        else:
            raise Unknown(f"a dimension of {size} with the factors {dim}")
    return found

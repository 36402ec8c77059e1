"""Calls that stand for a change of placement in a graph at global shapes, where they are identities.

``reshard`` says what is wanted; ``choose_collectives`` replaces it by collectives on sub-axes; the
lowering gives these groups, sizes and local shapes. Placements are tuples with one entry per sub-axis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .placements import Placement, Shard

Placements = tuple[Placement, ...]
Axes = tuple[int, ...]


def reshard(x: Tensor, src: Placements, dst: Placements) -> Tensor:
    """Wants ``x`` in another placement."""
    return x


def all_reduce(x: Tensor, axes: Axes, op: str) -> Tensor:
    """``P(op) -> R`` on these axes."""
    return x


def all_reduce_coalesced(xs: list[Tensor], axes: Axes, op: str) -> list[Tensor]:
    """``P(op) -> R`` of several values in one collective."""
    return list(xs)


def all_gather(x: Tensor, axes: Axes, place: Shard) -> Tensor:
    """``S(place) -> R`` on these axes."""
    return x


def reduce_scatter(x: Tensor, axes: Axes, place: Shard) -> Tensor:
    """``P(sum) -> S(place)`` on these axes."""
    return x


def all_to_all(x: Tensor, axes: Axes, src: Shard, dst: Shard) -> Tensor:
    """``S(src) -> S(dst)`` on these axes."""
    return x


def take_shard(x: Tensor, axes: Axes, place: Shard) -> Tensor:
    """``R -> S(place)`` on these axes: each rank takes its part."""
    return x


def keep_first(x: Tensor, axes: Axes) -> Tensor:
    """``R -> P(sum)`` on these axes: the first rank keeps the value, the others have zeros."""
    return x


def pad_shard(x: Tensor, axes: Axes, place: Shard) -> Tensor:
    """``S(place) -> P(sum)`` on these axes: each rank fills up with zeros."""
    return x


def copy_to_ranks(x: Tensor, axes: Axes) -> Tensor:
    """``R -> R`` whose gradient is ``P(sum)``: backward reduces it (Megatron-LM's ``f``)."""
    return x


def matmul_merged(matmul: Callable[..., Tensor], *args: Any) -> list[Tensor]:
    """Several calls of one matmul: operands that differ are lists, and lie one behind the other on a rank."""
    count = next(len(a) for a in args if isinstance(a, list | tuple))
    return [matmul(*(a[i] if isinstance(a, list | tuple) else a for a in args)) for i in range(count)]


def part_of(results: list[Tensor], index: int) -> Tensor:
    """One result of ``matmul_merged``: a matmul whose factors and placement are those that were planned."""
    return results[index]


MARKERS: tuple[Callable[..., object], ...] = (
    reshard,
    all_reduce,
    all_reduce_coalesced,
    all_gather,
    reduce_scatter,
    all_to_all,
    take_shard,
    keep_first,
    pad_shard,
    copy_to_ranks,
)
MERGED: tuple[Callable[..., object], ...] = (matmul_merged, part_of)
"""Not changes of placement, but calls that only the lowering can carry out."""
COMMUNICATING = frozenset({all_reduce, all_reduce_coalesced, all_gather, reduce_scatter, all_to_all})

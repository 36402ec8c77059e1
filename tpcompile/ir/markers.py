"""Calls that stand for a change of placement in a graph at global shapes, where they are identities.

``reshard`` says what is wanted; ``choose_collectives`` replaces it by collectives on sub-axes; the
lowering gives these groups, sizes and local shapes. Placements are tuples with one entry per sub-axis.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import Node

from .nodes import arguments
from .placements import Filled, Owned, Placement, Shard

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


def all_gather(
    x: Tensor, axes: Axes, place: Shard | Filled, size: int | None = None, partial: bool = False
) -> Tensor:
    """``S(place) -> R`` on these axes. A filled place needs the whole ``size``.

    ``partial``: the ranks go on differently, so that the gradient is ``P(sum)``.
    """
    return x


def reduce_scatter(x: Tensor, axes: Axes, place: Shard | Filled) -> Tensor:
    """``P(sum) -> S(place)`` on these axes."""
    return x


def all_to_all(x: Tensor, axes: Axes, src: Shard, dst: Shard | Filled) -> Tensor:
    """``S(src) -> S(dst)`` on these axes."""
    return x


def take_shard(x: Tensor, axes: Axes, place: Shard | Filled) -> Tensor:
    """``R -> S(place)`` on these axes: each rank takes its part."""
    return x


def keep_first(x: Tensor, axes: Axes) -> Tensor:
    """``R -> P(sum)`` on these axes: the first rank keeps the value, the others have zeros."""
    return x


def pad_shard(x: Tensor, axes: Axes, place: Shard | Filled, size: int | None = None) -> Tensor:
    """``S(place) -> P(sum)`` on these axes: each rank fills up with zeros."""
    return x


def copy_to_ranks(x: Tensor, axes: Axes) -> Tensor:
    """``R -> R`` whose gradient is ``P(sum)``: backward reduces it (Megatron-LM's ``f``)."""
    return x


def gradient_once(x: Tensor, axes: Axes) -> Tensor:
    """``R -> R`` whose gradient, whole on every rank, counts once beside summands: ``P(sum)``."""
    return x


def mask_rows(x: Tensor, axes: Axes, place: Owned, ids: Tensor) -> Tensor:
    """``O -> P(sum)`` on these axes: rows of other ranks' experts become zeros."""
    return x


def keep_whole(x: Tensor) -> Tensor:
    """Wants ``x`` whole here, whoever comes next (a plan that gathers, taken literally)."""
    return x


def matmul_merged(matmul: Callable[..., Tensor], *args: Any) -> list[Tensor]:
    """Several calls of one matmul: operands that differ are lists, and follow each other on a rank."""
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
    gradient_once,
    keep_whole,
    mask_rows,
)
MERGED: tuple[Callable[..., object], ...] = (matmul_merged, part_of)
"""Not changes of placement, but calls that only the lowering can carry out."""
COMMUNICATING = frozenset({all_reduce, all_reduce_coalesced, all_gather, reduce_scatter, all_to_all})


def origin(value: Node) -> Node:
    """The value that a change of placement started from: it has the same factors; what is joined has none."""
    while value.op == "call_function":
        found: object = None
        if value.target in MARKERS:
            found = arguments(value)[0]
        elif value.target is operator.getitem and arguments(value)[0].target in MARKERS:
            found = arguments(arguments(value)[0])[0][arguments(value)[1]]
        if not isinstance(found, Node):
            break
        value = found
    return value

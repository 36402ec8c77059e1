"""Rows that belong to experts: how their computation begins on the rank that holds some of the experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Node

from tpcompile.ir.nodes import operands
from tpcompile.ir.placements import Owned, Placement, R, split_evenly
from tpcompile.rules.choices import Choice

from .state import Lowering

aten = torch.ops.aten


def begins_rows(choice: Choice | None) -> bool:
    """Whether a call divides experts and gives rows that belong to them."""
    return choice is not None and choice.factor is not None and isinstance(choice.outputs[0], Owned)


def owned_units(low: Lowering, placements: Sequence[Placement], place: Owned) -> tuple[int, int]:
    """The first expert that this rank holds, and how many; axes divide one after the other."""
    first, size = 0, place.units
    for ranks, at, placement in zip(low.shapes.axis_sizes, low.shapes.coordinates, placements, strict=True):
        if isinstance(placement, Owned) and (placement.ids, placement.units) == (place.ids, place.units):
            sizes = split_evenly(size, ranks)
            first, size = first + sum(sizes[:at]), sizes[at]
    return first, size


def rows_here(low: Lowering, node: Node, ids: Node, units: tuple[int, int], every: int) -> Node:
    """Which rows have chosen an expert of this rank, of so many in all."""
    ids = _from_front(low, node, ids, every)
    return low.within(ids, units[0], units[0] + units[1], like=node)


def lower_rows(low: Lowering, node: Node, choice: Choice) -> Node:
    """A choice among this rank's experts, or a matmul of the rows that have chosen one of them.

    Experts may be divided within themselves on other sub-axes.

    Raises:
        ValueError: what says the experts is divided: the call is planned again.
    """
    place = choice.outputs[0]
    assert isinstance(place, Owned)
    chosen = [c for c in node.meta["choices"] if c is not None]
    at = len(choice.inputs) - 1  # what says the experts is the last operand
    if any(c.inputs[at] != R for c in chosen):
        raise ValueError("what says whose the rows are is divided")
    units = owned_units(low, node.meta["placement"], place)
    if node.target is aten.index.Tensor:
        return _choose(low, node, units, place.units)
    return _multiply(low, node, units)


def _from_front(low: Lowering, node: Node, ids: Node, every: int) -> Node:
    """Numbers of which negative ones are counted from the end, as indices are, as ones from the front."""
    negative = low.emit(aten.lt.Scalar, ids, 0, like=node)
    counted = low.emit(aten.add.Tensor, ids, every, like=node)
    return low.emit(aten.where.self, negative, counted, ids, like=node)


def _choose(low: Lowering, node: Node, units: tuple[int, int], every: int) -> Node:
    """``stack[ids]``: rows of other ranks' experts get any expert of this one; what is none fails."""
    stack, given = (low.map(o) for o in operands(node))
    ids = _from_front(low, node, given, every)
    moved = low.emit(aten.sub.Tensor, ids, units[0], like=node)
    safe = low.emit(aten.clamp.default, moved, 0, units[1] - 1, like=node)
    exists = low.within(ids, 0, every, like=node)
    safe = low.emit(aten.where.ScalarOther, exists, safe, every, like=node)
    return low.emit(aten.index.Tensor, stack, [safe], like=node)


def _multiply(low: Lowering, node: Node, units: tuple[int, int]) -> Node:
    """A grouped matmul: this rank's rows are moved to the front, the others are zeros and cost nothing."""
    x, stack, offsets = (low.map(o) for o in operands(node))
    first, count = units
    ends = low.emit(aten.slice.Tensor, offsets, 0, first, first + count, like=node)
    position = low.emit(aten.slice.Tensor, x, 1, 0, 1, like=node)
    position = low.emit(aten.squeeze.dim, position, 1, like=node)
    position = low.emit(aten.ones_like.default, position, dtype=torch.int64, like=node)
    position = low.emit(aten.cumsum.default, position, 0, like=node)
    position = low.emit(aten.sub.Tensor, position, 1, like=node)
    behind = position
    if first:
        start = low.emit(aten.slice.Tensor, offsets, 0, first - 1, first, like=node)
        ends = low.emit(aten.sub.Tensor, ends, start, like=node)
        total = low.emit(aten.sym_size.int, x, 0, like=node)
        ahead = low.emit(aten.add.Tensor, position, start, like=node)
        ahead = low.emit(aten.remainder.Scalar, ahead, total, like=node)
        x = low.emit(aten.index.Tensor, x, [ahead], like=node)
        behind = low.emit(aten.sub.Tensor, position, start, like=node)
        behind = low.emit(aten.remainder.Scalar, behind, total, like=node)
    last = low.emit(aten.slice.Tensor, ends, 0, count - 1, count, like=node)
    mine = low.emit(aten.lt.Tensor, position, last, like=node)
    mine = low.emit(aten.unsqueeze.default, mine, -1, like=node)
    # Kernels leave the other rows as they find them, in forward and in backward.
    x = low.emit(aten.where.ScalarOther, mine, x, 0.0, like=node)
    ends = low.emit(aten._to_copy.default, ends, dtype=torch.int32, like=node)
    options = [low.map(a) for a in node.args[3:]]
    y = low.emit(node.target, x, stack, ends, *options, like=node)
    y = low.emit(aten.where.ScalarOther, mine, y, 0.0, like=node)
    return low.emit(aten.index.Tensor, y, [behind], like=node) if first else y

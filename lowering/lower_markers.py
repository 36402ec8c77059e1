"""Gives abstract collectives their groups, sizes and dimensions on one rank."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tpcompile.errors import TpCompileError
from tpcompile.ir import markers
from tpcompile.ir.markers import Axes, Placements, origin
from tpcompile.ir.nodes import arguments, op_name, operands, producer
from tpcompile.ir.placements import Shard
from tpcompile.rules.reductions import EXTREMES, reduced_dims

from . import collectives as _registers_the_operators  # noqa: F401
from .lower_positions import lower_positions, moves_positions
from .owned_rows import owned_units, rows_here
from .state import Lowering

ops = torch.ops.tpcompile
aten = torch.ops.aten


def lower_marker(low: Lowering, node: Node) -> Any:
    """The local nodes of one abstract collective.

    Raises:
        TpCompileError: an abstract reshard was left in the graph.
    """
    if node.target not in _LOWER:
        raise TpCompileError(
            f"{node.name} was not turned into a collective",
            where="lowering",
            todo="keep the pass choose-collectives",
        )
    return (lower_positions if moves_positions(node) else _LOWER[node.target])(low, node)


def _all_reduce(low: Lowering, node: Node) -> Node:
    x, axes, op = arguments(node)
    value, group = low.map(x), low.groups.name(axes)
    if op == "sum":
        return low.emit(ops.all_reduce.default, value, group, like=node)
    call, _ = producer(origin(x))
    if op_name(call) not in EXTREMES:  # of a rule that somebody else wrote
        return low.emit(ops.extreme.default, value, group, op, like=node)
    among, equal_nan = low.map(operands(call)[0]), op_name(call) in ("max", "min")
    return low.emit(ops.extreme.default, value, group, op, among, reduced_dims(call), equal_nan, like=node)


def _all_reduce_coalesced(low: Lowering, node: Node) -> list[Node]:
    """Several sums as one flat buffer: one collective instead of many small ones."""
    xs, axes, _ = arguments(node)
    parts = [low.map(x) for x in xs]
    sums = low.emit(ops.all_reduce_together.default, parts, low.groups.name(axes), like=node)
    return [low.emit(operator.getitem, sums, i, like=node) for i in range(len(parts))]


def _from_part(op: Any) -> Callable[[Lowering, Node], Node]:
    """Lowers what takes a part of a factor, and gives the whole of it."""

    def lower(low: Lowering, node: Node) -> Node:
        x, axes, place = arguments(node)
        return _along(low, node, _Move(op, x, x.meta["placement"], place, axes, from_part=True))

    return lower


def _to_part(op: Any) -> Callable[[Lowering, Node], Node]:
    """Lowers what takes the whole of a factor, and gives a part of it."""

    def lower(low: Lowering, node: Node) -> Node:
        x, axes, place = arguments(node)
        return _along(low, node, _Move(op, x, node.meta["placement"], place, axes))

    return lower


def _all_to_all(low: Lowering, node: Node) -> Node:
    x, axes, src, dst = arguments(node)
    before, after = x.meta["placement"], node.meta["placement"]
    name, index = low.groups.name(axes), low.groups.index(axes)
    static = (isinstance(low.shapes.inside(x, p, s), int) for p, s in ((before, src), (after, dst)))
    if src.factor or dst.factor or not all(static):  # not contiguous: by way of the whole
        whole = _along(low, node, _Move(ops.all_gather.default, x, before, src, axes, from_part=True))
        return _along(low, node, _Move(ops.take_shard.default, x, after, dst, axes, local=whole))
    sizes = [
        [p * low.shapes.minor(x, place, shard) for p in low.shapes.parts(x, place, shard, axes)]
        for place, shard in ((before, src), (after, dst))
    ]
    return low.emit(ops.all_to_all.default, low.map(x), name, src.dim, dst.dim, *sizes, index, like=node)


def _keep_first(low: Lowering, node: Node) -> Node:
    x, axes = arguments(node)
    return low.emit(ops.keep_first.default, low.map(x), low.groups.index(axes), like=node)


def _copy_to_ranks(low: Lowering, node: Node) -> Node:
    x, axes = arguments(node)
    return low.emit(ops.copy_to_ranks.default, low.map(x), low.groups.name(axes), like=node)


def _gradient_once(low: Lowering, node: Node) -> Node:
    x, axes = arguments(node)
    return low.emit(ops.gradient_once.default, low.map(x), low.groups.index(axes), like=node)


def _mask_rows(low: Lowering, node: Node) -> Node:
    x, _, place, ids = arguments(node)
    units = owned_units(low, x.meta["placement"], place)
    here = rows_here(low, node, low.map(ids), units, place.units)
    for _ in range(x.meta["val"].ndim - 1 - place.dim):
        here = low.emit(aten.unsqueeze.default, here, -1, like=node)
    return low.emit(aten.where.ScalarOther, here, low.map(x), 0.0, like=node)


def _keep_whole(low: Lowering, node: Node) -> Any:
    return low.map(arguments(node)[0])


def _matmul_merged(low: Lowering, node: Node) -> list[Node]:
    """One matmul on segments that are together; its results stand beside each other in the last dimension."""
    target, *args = arguments(node)
    groups = [a for a in args if isinstance(a, list | tuple)]
    packed = {id(g): low.program.packed_dims[low.program.sources[g[0]].spec.name] for g in groups}
    given = [low.join(a, packed[id(a)]) if id(a) in packed else low.map(a) for a in args]
    weights = max(groups, key=lambda g: g[0].meta["val"].ndim)
    sizes = [low.map(w).meta["val"].shape[packed[id(weights)]] for w in weights]
    whole = low.emit(target, *given, like=node)
    pieces = low.emit(aten.split_with_sizes.default, whole, sizes, -1, like=node)
    return [low.emit(operator.getitem, pieces, i, like=node) for i in range(len(sizes))]


def _part_of(low: Lowering, node: Node) -> Node:
    merged, index = arguments(node)
    part: Node = low.map(merged)[index]
    return part


@dataclass(frozen=True)
class _Move:
    """A collective along a factor.

    Attributes:
        op: the operator.
        value: the value in the global graph.
        placements: its placements on the side where the factor is divided.
        place: the factor.
        axes: the sub-axes of the group.
        from_part: the factor is divided before, not after.
        local: the local value, if it is not the value's own.
    """

    op: Any
    value: Node
    placements: Placements
    place: Shard
    axes: Axes
    from_part: bool = False
    local: Node | None = None


def _along(low: Lowering, node: Node, move: _Move) -> Node:
    """Issues a collective along a factor, exposed as a dimension where it is one of several."""
    x = low.map(move.value) if move.local is None else move.local
    dim, factor, index = move.place.dim, move.place.factor, low.groups.index(move.axes)
    parts = low.shapes.parts(move.value, move.placements, move.place, move.axes)
    group = [] if move.op is ops.pad_shard.default else [low.groups.name(move.axes)]
    minor = low.shapes.inside(move.value, move.placements, move.place)
    if factor == 0 and isinstance(minor, int):
        return low.emit(move.op, x, *group, dim, [p * minor for p in parts], index, like=node)
    held = parts[index] if move.from_part else sum(parts)
    major = low.shapes.outside(move.value, move.placements, move.place)
    sizes = [s if isinstance(s, int) else -1 for s in (major, held, minor)][factor == 0 :]
    opened = low.emit(aten.unflatten.int, x, dim, sizes, like=node)
    moved = low.emit(move.op, opened, *group, dim + (factor > 0), parts, index, like=node)
    return low.emit(aten.flatten.using_ints, moved, dim, dim + len(sizes) - 1, like=node)


_LOWER: dict[Any, Callable[[Lowering, Node], Any]] = {
    markers.all_reduce: _all_reduce,
    markers.all_reduce_coalesced: _all_reduce_coalesced,
    markers.all_gather: _from_part(ops.all_gather.default),
    markers.reduce_scatter: _to_part(ops.reduce_scatter.default),
    markers.take_shard: _to_part(ops.take_shard.default),
    markers.pad_shard: _from_part(ops.pad_shard.default),
    markers.all_to_all: _all_to_all,
    markers.keep_first: _keep_first,
    markers.copy_to_ranks: _copy_to_ranks,
    markers.gradient_once: _gradient_once,
    markers.keep_whole: _keep_whole,
    markers.mask_rows: _mask_rows,
    markers.matmul_merged: _matmul_merged,
    markers.part_of: _part_of,
}

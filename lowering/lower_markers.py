"""Gives abstract collectives their groups, sizes and dimensions on one rank."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from tpcompile import markers
from tpcompile.errors import TpCompileError
from tpcompile.markers import Axes, Placements
from tpcompile.placements import Shard

from . import collectives as _registers_the_operators  # noqa: F401

if TYPE_CHECKING:
    from .lower_graph import Lowering

ops = torch.ops.tpcompile
aten = torch.ops.aten


def lower_marker(low: Lowering, node: Node) -> Any:
    """The local nodes of one abstract collective.

    Raises:
        TpCompileError: an abstract reshard was left in the graph.
    """
    if node.target not in _LOWER:
        raise TpCompileError(f"{node.name} was not turned into a collective", todo="keep the pass choose-collectives")
    return _LOWER[node.target](low, node)


def _all_reduce(low: Lowering, node: Node) -> Node:
    x, axes, op = node.args
    return low.emit(ops.all_reduce.default, low.map(x), low.groups.name(axes), op, like=node)


def _all_reduce_coalesced(low: Lowering, node: Node) -> list[Node]:
    """Several values as one flat buffer: one collective instead of many small ones."""
    xs, axes, op = node.args
    parts = [low.map(x) for x in xs]
    flat = [low.emit(aten.flatten.using_ints, p, like=node) for p in parts]
    joined = low.emit(aten.cat.default, flat, like=node)
    reduced = low.emit(ops.all_reduce.default, joined, low.groups.name(axes), op, like=node)
    sizes = [low.emit(aten.sym_numel.default, p, like=node) for p in parts]
    pieces = low.emit(aten.split_with_sizes.default, reduced, sizes, like=node)
    out = []
    for i, part in enumerate(parts):
        piece = low.emit(operator.getitem, pieces, i, like=node)
        out.append(low.emit(aten.view_as.default, piece, part, like=node))
    return out


def _all_gather(low: Lowering, node: Node) -> Node:
    x, axes, place = node.args
    before = x.meta["placement"]

    def gather(value: Node, dim: int, sizes: list[int]) -> Node:
        return low.emit(
            ops.all_gather.default, value, low.groups.name(axes), dim, sizes, low.groups.index(axes), like=node
        )

    return _along(low, node, x, before, place, axes, gather)


def _reduce_scatter(low: Lowering, node: Node) -> Node:
    x, axes, place = node.args

    def scatter(value: Node, dim: int, sizes: list[int]) -> Node:
        return low.emit(
            ops.reduce_scatter.default, value, low.groups.name(axes), dim, sizes, low.groups.index(axes), like=node
        )

    return _along(low, node, x, node.meta["placement"], place, axes, scatter)


def _take_shard(low: Lowering, node: Node) -> Node:
    x, axes, place = node.args

    def take(value: Node, dim: int, sizes: list[int]) -> Node:
        return low.emit(
            ops.take_shard.default, value, low.groups.name(axes), dim, sizes, low.groups.index(axes), like=node
        )

    return _along(low, node, x, node.meta["placement"], place, axes, take)


def _pad_shard(low: Lowering, node: Node) -> Node:
    x, axes, place = node.args

    def pad(value: Node, dim: int, sizes: list[int]) -> Node:
        return low.emit(ops.pad_shard.default, value, dim, sizes, low.groups.index(axes), like=node)

    return _along(low, node, x, x.meta["placement"], place, axes, pad)


def _all_to_all(low: Lowering, node: Node) -> Node:
    x, axes, src, dst = node.args
    before, after = x.meta["placement"], node.meta["placement"]
    name, index = low.groups.name(axes), low.groups.index(axes)
    if src.factor or dst.factor:  # not contiguous: by way of the whole
        whole = _along(
            low, node, x, before, src, axes,
            lambda v, d, s: low.emit(ops.all_gather.default, v, name, d, s, index, like=node),
        )
        return _along(
            low, node, x, after, dst, axes,
            lambda v, d, s: low.emit(ops.take_shard.default, v, name, d, s, index, like=node), whole,
        )
    sizes = [
        [p * low.shapes.minor(x, place, shard) for p in low.shapes.parts(x, place, shard, axes)]
        for place, shard in ((before, src), (after, dst))
    ]
    return low.emit(ops.all_to_all.default, low.map(x), name, src.dim, dst.dim, *sizes, index, like=node)


def _keep_first(low: Lowering, node: Node) -> Node:
    x, axes = node.args
    return low.emit(ops.keep_first.default, low.map(x), low.groups.index(axes), like=node)


def _copy_to_ranks(low: Lowering, node: Node) -> Node:
    x, axes = node.args
    return low.emit(ops.copy_to_ranks.default, low.map(x), low.groups.name(axes), like=node)


def _along(
    low: Lowering,
    node: Node,
    value: Node,
    placements: Placements,
    place: Shard,
    axes: Axes,
    collective: Callable[[Node, int, list[int]], Node],
    local: Node | None = None,
) -> Node:
    """Applies a collective along a factor; one that is not the major of its dimension is exposed first."""
    x = low.map(value) if local is None else local
    minor = low.shapes.minor(value, placements, place)
    sizes = [p * minor for p in low.shapes.parts(value, placements, place, axes)]
    if place.factor == 0:
        return collective(x, place.dim, sizes)
    atoms = low.shapes.atoms(value, placements)[place.dim][: place.factor]
    major = 1
    for atom in atoms:
        assert isinstance(atom, int)
        major *= atom
    inner = x.meta["val"].shape[place.dim] // major
    opened = low.emit(aten.unflatten.int, x, place.dim, [major, int(inner)], like=node)
    moved = collective(opened, place.dim + 1, sizes)
    return low.emit(aten.flatten.using_ints, moved, place.dim, place.dim + 1, like=node)


_LOWER: dict[Any, Callable[[Lowering, Node], Any]] = {
    markers.all_reduce: _all_reduce,
    markers.all_reduce_coalesced: _all_reduce_coalesced,
    markers.all_gather: _all_gather,
    markers.reduce_scatter: _reduce_scatter,
    markers.take_shard: _take_shard,
    markers.pad_shard: _pad_shard,
    markers.all_to_all: _all_to_all,
    markers.keep_first: _keep_first,
    markers.copy_to_ranks: _copy_to_ranks,
}

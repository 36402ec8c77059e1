"""Gives collectives along a filled dimension (``S(1+)``) their groups, sizes and dimensions on one rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from tpcompile import markers
from tpcompile.placements import Filled
from tpcompile.rules.rule import arguments

from . import position_collectives as _registers_the_operators  # noqa: F401

if TYPE_CHECKING:
    from .lower_graph import Lowering

ops = torch.ops.tpcompile


def moves_positions(node: Node) -> bool:
    """Whether a marker is about a filled dimension."""
    return any(isinstance(a, Filled) for a in node.args)


def lower_positions(low: Lowering, node: Node) -> Node:
    """The local node of an abstract collective along a filled dimension."""
    x, axes, place, *rest = arguments(node)
    local, name, index = low.map(x), low.groups.name(axes), low.groups.index(axes)
    if node.target is markers.all_to_all:
        into, before = rest[0].dim, x.meta["placement"]
        minor = low.shapes.minor(x, before, place)
        sizes = [p * minor for p in low.shapes.parts(x, before, place, axes)]
        return low.emit(ops.exchange_positions.default, local, name, place.dim, into, sizes, index, like=node)
    placements = node.meta["placement"] if place in node.meta["placement"] else x.meta["placement"]
    ranks = low.shapes.sharing(placements, place)
    if node.target is markers.all_gather:
        size, partial = low.map(rest[0]), rest[1]
        return low.emit(
            ops.gather_positions.default, local, name, place.dim, ranks, index, size, partial, like=node
        )
    if node.target is markers.pad_shard:
        size = low.map(rest[0])
        return low.emit(ops.pad_positions.default, local, place.dim, ranks, index, size, like=node)
    scatters = node.target is markers.reduce_scatter
    op = ops.scatter_positions if scatters else ops.take_positions
    return low.emit(op.default, local, name, place.dim, ranks, index, like=node)

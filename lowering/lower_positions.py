"""Gives collectives along a filled dimension (``S(1+)``) their groups, sizes and dimensions on one rank."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from tpcompile.ir import markers
from tpcompile.ir.nodes import arguments
from tpcompile.ir.placements import Filled

from . import position_collectives as _registers_the_operators  # noqa: F401
from .state import Lowering

ops = torch.ops.tpcompile


def moves_positions(node: Node) -> bool:
    """Whether a marker is about a filled dimension."""
    return any(isinstance(a, Filled) for a in node.args)


def lower_positions(low: Lowering, node: Node) -> Node:
    """The local node of an abstract collective along a filled dimension.

    What it gives is said, not computed on fake tensors: there a part that happens to have one position for
    the example's length would be taken for one that always has.
    """
    x, axes, place, *rest = arguments(node)
    local, name, index = low.map(x), low.groups.name(axes), low.groups.index(axes)
    placed = [*node.meta["placement"], *x.meta["placement"]]
    ranks = math.prod(low.program.axis_sizes[a] for a in axes)
    args: tuple[Any, ...]
    if node.target is markers.all_to_all:
        before = x.meta["placement"]
        minor = low.shapes.minor(x, before, place)
        sizes = [p * minor for p in low.shapes.parts(x, before, place, axes)]
        args = (local, name, place.dim, rest[0].dim, sizes, index)
        return low.emit_as(ops.exchange_positions.default, args, _part(low, node, rest[0], ranks), like=node)
    assert place in placed, "a filled dimension is divided on one side"
    if node.target is markers.all_gather:
        args = (local, name, place.dim, ranks, index, low.map(rest[0]), rest[1])
        return low.emit_as(ops.gather_positions.default, args, _whole(low, node), like=node)
    if node.target is markers.pad_shard:
        args = (local, place.dim, ranks, index, low.map(rest[0]))
        return low.emit_as(ops.pad_positions.default, args, _whole(low, node), like=node)
    scatters = node.target is markers.reduce_scatter
    op = ops.scatter_positions if scatters else ops.take_positions
    args = (local, name, place.dim, ranks, index)
    return low.emit_as(op.default, args, _part(low, node, place, ranks), like=node)


def _whole(low: Lowering, node: Node) -> torch.Tensor:
    return _empty(low, node, list(node.meta["val"].shape))


def _part(low: Lowering, node: Node, place: Filled, ranks: int) -> torch.Tensor:
    sizes = list(node.meta["val"].shape)
    # Of a length that only some calls fix, not all fake tensors know it: the factors do.
    held = low.shapes.shape(node, node.meta["placement"])[place.dim]
    sizes[place.dim] = held if isinstance(held, int) else low.part_of(sizes[place.dim], ranks)
    return _empty(low, node, sizes)


def _empty(low: Lowering, node: Node, sizes: list[Any]) -> torch.Tensor:
    found: torch.Tensor = low.value_of(torch.Tensor.new_empty, node.meta["val"], sizes)
    return found

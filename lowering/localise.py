"""Rewrites of operators whose constants, or whose meaning, change when a factor is divided."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node

from tpcompile.ir.markers import origin
from tpcompile.ir.nodes import arguments, operands, option, results, shape
from tpcompile.ir.placements import Filled, Shard
from tpcompile.ir.sizes import Size, sizes_of
from tpcompile.rules.kernels import HEADS
from tpcompile.rules.reductions import reduced_dims

from .state import Lowering

aten = torch.ops.aten
# Where the sizes stand among the arguments.
_SIZED = {
    aten.view.default: 1,
    aten._unsafe_view.default: 1,
    aten.reshape.default: 1,
    aten.expand.default: 1,
    aten.unflatten.int: 2,
    aten.new_zeros.default: 1,
    aten.new_ones.default: 1,
    aten.new_full.default: 1,
    aten.new_empty.default: 1,
}


def unchanged(low: Lowering, node: Node) -> Node:
    """The same call on local values."""
    return low.emit(node.target, *low.map(node.args), like=node, **low.map(node.kwargs))


def sizes(low: Lowering, node: Node) -> Node:
    """Views and expansions: the sizes that they name become local."""
    if node.target not in _SIZED:
        return unchanged(low, node)
    at = _SIZED[node.target]
    wanted = low.shapes.shape(node, node.meta["placement"])
    args = list(low.map(node.args))
    filled = next((p.dim for p in node.meta["placement"] if isinstance(p, Filled)), None)
    first = args[1] % (len(wanted) - len(args[2]) + 1) if node.target is aten.unflatten.int else 0
    named = zip(args[at], shape(node)[first:], wanted[first:], strict=False)
    args[at] = [
        _filled_size(low, node) if d == filled else _local_size(low, node, arg, whole, part)
        for d, (arg, whole, part) in enumerate(named, first)
    ]
    return low.emit(node.target, *args, like=node, **low.map(node.kwargs))


def _local_size(low: Lowering, node: Node, arg: Any, whole: Size, part: Size) -> Any:
    if isinstance(part, int):
        return part  # also for -1, which torch cannot tell where a rank has nothing
    if whole == part or (isinstance(arg, int) and arg == -1):
        return arg
    # A dynamic dimension with a divided factor in it, such as (batch heads): scale what the graph computes.
    return _scale(low, node, arg, part, whole)


def _filled_size(low: Lowering, node: Node) -> Any:
    """How many positions this rank has, read from an operand that has them."""
    for operand in operands(node):
        for placement in operand.meta.get("placement", ()):
            if isinstance(placement, Filled):
                size = low.map(operand).meta["val"].shape[placement.dim]
                if isinstance(size, int):
                    return size
                return low.emit(aten.sym_size.int, low.map(operand), placement.dim, like=node)
    raise AssertionError("a value with divided positions comes from one with divided positions")


def _scale(low: Lowering, node: Node, number: Any, numerator: Size, denominator: Size) -> Any:
    ratio = sympy.cancel(sympy.sympify(numerator) / sympy.sympify(denominator))
    scaled = low.emit(operator.mul, number, int(ratio.p), like=node)
    return low.emit(operator.floordiv, scaled, int(ratio.q), like=node)


def split(low: Lowering, node: Node) -> Node:
    """Equal parts of a divided size: each part is local."""
    parts = results(node)
    dim = option(node, "dim", 0) % len(sizes_of(parts[0]))
    source = operands(node)[0]
    local = low.map(source)
    held = sizes_of(local.meta["val"])[dim]
    if held == shape(source)[dim]:
        return unchanged(low, node)
    assert isinstance(held, int), "only static sizes are divided"
    return low.emit(aten.split_with_sizes.default, local, [held // len(parts)] * len(parts), dim, like=node)


def mean(low: Lowering, node: Node) -> Node:
    """A mean over a divided dimension: this rank's summand of it."""
    if not any(place is None for _, factor in low.divided(node) for place in factor.outputs):
        return unchanged(low, node)
    source = operands(node)[0]
    over = reduced_dims(node)
    dtype = results(node)[0].dtype
    # As torch does it: the sum of many half-precision numbers may be larger than any of them can be.
    wide = torch.promote_types(dtype, torch.float32)
    total = low.emit(
        aten.sum.dim_IntList, low.map(source), over, option(node, "keepdim", False), dtype=wide, like=node
    )
    count: Any = math.prod(s for d in over if isinstance(s := shape(source)[d], int))
    for dim in over:
        if not isinstance(shape(source)[dim], int):
            count = low.emit(operator.mul, _whole_size(low, node, source, dim), count, like=node)
    part = low.emit(aten.div.Tensor, total, count, like=node)
    return part if dtype == wide else low.emit(aten._to_copy.default, part, dtype=dtype, like=node)


def lookup(low: Lowering, node: Node) -> Node:
    """An embedding whose rows are divided: rows of other ranks are zeros, and the sum is the whole."""
    table, index, *_ = arguments(node)
    held = _held(low, node, table, 0)
    if held is None:
        return unchanged(low, node)
    padding = option(node, "padding_idx", -1) - held[0]
    found, here = _find(low, node, (table, index, 0), held)
    part = low.emit(aten.embedding.default, *found, padding if 0 <= padding < held[1] else -1, like=node)
    mask = low.emit(aten.unsqueeze.default, here, -1, like=node)
    # Not a product: the row that is looked up for want of another may be infinite, or no number at all.
    return low.emit(aten.where.ScalarOther, mask, part, 0.0, like=node)


def pick(low: Lowering, node: Node) -> Node:
    """A gather along a divided dimension: what other ranks have is zero here, and the sum is the whole."""
    x, dim, index, *_ = arguments(node)
    dim %= len(shape(x))
    held = _held(low, node, x, dim)
    if held is None:
        return unchanged(low, node)
    (part, safe), here = _find(low, node, (x, index, dim), held)
    found = low.emit(aten.gather.default, part, dim, safe, like=node, **node.kwargs)
    return low.emit(aten.where.ScalarOther, here, found, 0, like=node)


def _held(low: Lowering, node: Node, table: Node, dim: int) -> tuple[int, int] | None:
    """The first position of a looked-up dimension that this rank holds, and how many; None if it is whole."""
    placements, place = table.meta["placement"], Shard(dim)
    if not any(f.inputs[0] is not None and f.inputs[0][0] == dim for _, f in low.divided(node)):
        return None
    if any(isinstance(p, Shard) and p.dim == dim and p != place for p in placements):
        raise ValueError("a look-up in parts that are not in one piece")  # it is planned again, as a whole
    minor = low.shapes.minor(table, placements, place)
    count = low.shapes.shape(table, placements)[dim]
    assert isinstance(minor, int) and isinstance(count, int), "only static sizes are divided"
    return low.shapes.start(table, placements, place) * minor, count


def _find(
    low: Lowering, node: Node, wanted: tuple[Node, Node, int], held: tuple[int, int]
) -> tuple[tuple[Node, Node], Node]:
    """This rank's part of a table, where to look in it, and which of the wanted positions are in it.

    A position that the whole does not have, no part has, so that looking it up fails here as it does there.
    """
    table, index, dim = low.map(wanted[0]), low.map(wanted[1]), wanted[2]
    first, count = held
    if count == 0:  # more ranks than positions: one of zeros, which nothing finds
        behind = table.meta["val"].ndim - 1 - dim
        table = low.emit(aten.constant_pad_nd.default, table, [0, 0] * behind + [0, 1], like=node)
    moved = low.emit(aten.sub.Tensor, index, first, like=node)
    here = low.within(moved, 0, count, like=node)
    own = low.emit(aten.mul.Tensor, moved, here, like=node)
    exists = low.within(index, 0, shape(wanted[0])[dim], like=node)
    return (table, low.emit(aten.where.self, exists, own, index, like=node)), here


def groups(low: Lowering, node: Node) -> Node:
    """A convolution: as many groups as this rank has."""
    return _with_units(low, node, "groups")


def group_norm(low: Lowering, node: Node) -> Node:
    """A group norm: as many groups as this rank has."""
    return _with_units(low, node, "num_groups")


def _with_units(low: Lowering, node: Node, name: str) -> Node:
    """The call with as many groups of channels (dimension 1) as this rank has, if these are divided."""
    places = [(f.inputs[0], f.outputs[0]) for _, f in low.divided(node)]
    if not any(place and made and place[0] == made[0] == 1 for place, made in places):
        return unchanged(low, node)
    held = _held_units(low, operands(node)[0], option(node, name, 1))
    declared = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(declared, low.map(node.args), strict=False)) | low.map(node.kwargs)
    at = declared.index(name)
    behind = {k: v for k, v in given.items() if declared.index(k) > at}
    return low.emit(
        node.target, *(given[k] for k in declared[:at] if k in given), like=node, **{name: held}, **behind
    )


def _held_units(low: Lowering, value: Node, units: int) -> int:
    """How many of the ``units`` that dimension 1 starts with are on this rank."""
    whole = low.shapes.factors.atom_sizes(origin(value))[1]
    part = low.shapes.atoms(value, value.meta["placement"])[1]
    total, held = 1, 1
    for all_of_it, mine in zip(whole, part, strict=True):
        if total == units:
            break
        assert isinstance(all_of_it, int) and isinstance(mine, int), "only static sizes are divided"
        total, held = total * all_of_it, held * mine
    return held


def sym_size(low: Lowering, node: Node) -> Any:
    """The whole size, read from a local tensor: scaled up where the dimension is divided."""
    return _whole_size(low, node, *arguments(node))


def _whole_size(low: Lowering, node: Node, source: Node, dim: int) -> Any:
    placements = source.meta.get("placement", ())
    whole, part = shape(source)[dim], low.shapes.shape(source, placements)[dim]
    read = low.emit(aten.sym_size.int, low.map(source), dim, like=node)
    return read if whole == part else _scale(low, node, read, whole, part)


def grouped_matmul(low: Lowering, node: Node) -> Node:
    """torch's kernel wants rows of multiples of 16 bytes; transformers' own loop takes what has others.

    The whole widths may be such multiples and a rank's parts not (1408 columns on 3 ranks).
    """
    given = [low.local[n] for n in operands(node)]
    weight: torch.Tensor = given[1].meta["val"]
    aligned = all(size * weight.itemsize % 16 == 0 for size in weight.shape[1:])
    if aligned or node.target is not aten._grouped_mm.default or len(given) != 3:
        return unchanged(low, node)
    return low.emit(torch.ops.transformers.grouped_mm_fallback.default, *given, like=node)


def attention(low: Lowering, node: Node) -> Node:
    """Without heads, two matmuls of nothing: torch 2.11 divides by the number of heads, and crashes.

    A mask stays an operand: its gradient is a sum over all ranks.
    """
    query, key, value, *masks = (low.local[n] for n in operands(node))
    sizes = key.meta["val"].shape
    if len(sizes) < 3 or not isinstance(sizes[-3], int) or sizes[-3] > 0:
        return unchanged(low, node)
    turned = low.emit(aten.transpose.int, key, -2, -1, like=node)
    scores = low.emit(aten.matmul.default, query, turned, like=node)
    for mask in masks:
        mask = low.emit(aten.type_as.default, mask, query, like=node)
        scores = low.emit(aten.add.Tensor, scores, mask, like=node)
    return low.emit(aten.matmul.default, scores, value, like=node)


def flex_attention(low: Lowering, node: Node) -> Node:
    """Python that is told a head's number is told that in the whole model."""
    inputs, numbers, key, *rest = arguments(node)
    call = low.program.captured.functions[key]
    mine = [*_heads(low, operands(node)[0]), *low.map(numbers[HEADS:])]
    return low.emit(node.target, low.map(inputs), mine, call.handle, *rest, like=node)


def _heads(low: Lowering, query: Node) -> tuple[int, int, int]:
    """This rank's heads: its ``h`` is the whole model's ``h // held * of + h % held + first``."""
    placements = query.meta["placement"]
    whole: list[Any] = list(low.shapes.factors.atom_sizes(origin(query))[1])
    mine: list[Any] = low.shapes.atoms(query, placements)[1]
    divided = [at for at, part in enumerate(mine) if part < whole[at]]
    inside = [math.prod(whole[at + 1 :]) for at in range(len(whole))]
    first = sum(low.shapes.start(query, placements, Shard(1, at)) * inside[at] for at in divided)
    last = divided[-1]
    if math.prod(mine[:last]) == 1:  # they stand together
        return first, 1, 1
    if len(divided) > 1:
        raise ValueError("heads of parts of groups")  # it is planned again, as a whole
    return first, mine[last] * inside[last], whole[last] * inside[last]


LOCALISERS: dict[str, Callable[[Lowering, Node], Node]] = {
    "sizes": sizes,
    "split": split,
    "mean": mean,
    "lookup": lookup,
    "pick": pick,
    "groups": groups,
    "group_norm": group_norm,
    "grouped_matmul": grouped_matmul,
    "attention": attention,
    "flex_attention": flex_attention,
}

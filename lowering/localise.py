"""Rewrites of operators whose constants, or whose meaning, change when a factor is divided."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch.fx import Node

from tpcompile.errors import TpCompileError
from tpcompile.graph_edit import module_path
from tpcompile.placements import Shard
from tpcompile.rules.rule import Size, operands, results, shape, sizes_of

if TYPE_CHECKING:
    from .lower_graph import Lowering

aten = torch.ops.aten
_SIZED = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.expand.default,
}


def sizes(low: Lowering, node: Node) -> Node:
    """Views and expansions: the sizes that they name become local."""
    if node.target not in _SIZED:
        return low.emit(node.target, *low.map(node.args), like=node, **low.map(node.kwargs))
    wanted = low.shapes.shape(node, node.meta["placement"])
    named = low.map(node.args[1])
    new = [
        _local_size(low, node, arg, whole, part)
        for arg, whole, part in zip(named, shape(node), wanted, strict=True)
    ]
    return low.emit(node.target, low.map(node.args[0]), new, like=node)


def _local_size(low: Lowering, node: Node, arg: Any, whole: Size, part: Size) -> Any:
    if whole == part or arg == -1:
        return arg
    if isinstance(part, int):
        return part
    # A dynamic dimension with a divided factor in it, such as (batch heads): scale what the graph computes.
    ratio = sympy.Rational(1) * sympy.cancel(sympy.sympify(part) / sympy.sympify(whole))
    scaled = low.emit(operator.mul, arg, int(ratio.p), like=node)
    return low.emit(operator.floordiv, scaled, int(ratio.q), like=node)


def split(low: Lowering, node: Node) -> Node:
    """Equal parts of a divided size: each part is local."""
    source = low.map(node.args[0])
    if node.target not in (aten.split.Tensor, aten.unsafe_split.Tensor, aten.split_with_sizes.default):
        return low.emit(node.target, source, *low.map(node.args[1:]), like=node, **low.map(node.kwargs))
    parts = results(node)
    dim = (node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)) % len(sizes_of(parts[0]))  # type: ignore[operator]
    whole = source.meta["val"].shape[dim]
    return low.emit(aten.split_with_sizes.default, source, [whole // len(parts)] * len(parts), dim, like=node)


def mean(low: Lowering, node: Node) -> Node:
    """A mean over a divided dimension: this rank's summand of it."""
    source = operands(node)[0]
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    rank = len(shape(source))
    over = [d % rank for d in (dims or range(rank))]  # type: ignore[union-attr,arg-type]
    count = 1
    for d in over:
        count *= shape(source)[d]  # type: ignore[assignment]
    divided = any(place is None for _, f in low.divided(node) for place in f.outputs)
    args, kwargs = low.map(node.args), low.map(node.kwargs)
    if not divided:
        return low.emit(node.target, *args, like=node, **kwargs)
    if not isinstance(count, int):
        raise TpCompileError(
            "a mean over a dynamic and a divided dimension at once is not supported",
            where=f"{node.name} in {module_path(node)}",
            todo="capture with dynamic=False",
        )
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    options = {"dtype": kwargs["dtype"]} if kwargs.get("dtype") is not None else {}
    total = low.emit(aten.sum.dim_IntList, args[0], over, keep, like=node, **options)
    return low.emit(aten.mul.Tensor, total, 1.0 / count, like=node)


def lookup(low: Lowering, node: Node) -> Node:
    """An embedding whose rows are divided: rows of other ranks are zeros, and the sum is the whole."""
    table, index = low.map(node.args[0]), low.map(node.args[1])
    rows_divided = any(f.inputs[0] is not None and f.inputs[0][0] == 0 for _, f in low.divided(node))
    if not rows_divided:
        return low.emit(node.target, *low.map(node.args), like=node, **low.map(node.kwargs))
    place = Shard(0)
    placements = node.args[0].meta["placement"]  # type: ignore[union-attr]
    minor = low.shapes.minor(node.args[0], placements, place)  # type: ignore[arg-type]
    first = low.shapes.start(node.args[0], placements, place) * minor  # type: ignore[arg-type]
    rows = int(table.meta["val"].shape[0])
    if rows == 0:  # more ranks than rows: one row of zeros, which nothing finds
        table, rows = low.emit(aten.constant_pad_nd.default, table, [0, 0, 0, 1], like=node), 0
    moved = low.emit(aten.sub.Tensor, index, first, like=node)
    above = low.emit(aten.ge.Scalar, moved, 0, like=node)
    below = low.emit(aten.lt.Scalar, moved, rows, like=node)
    here = low.emit(aten.logical_and.default, above, below, like=node)
    safe = low.emit(aten.mul.Tensor, moved, here, like=node)
    padding = node.args[2] if len(node.args) > 2 else node.kwargs.get("padding_idx", -1)
    assert isinstance(padding, int)
    local_padding = padding - first if 0 <= padding - first < rows else -1
    found = low.emit(aten.embedding.default, table, safe, local_padding, like=node)
    mask = low.emit(aten.unsqueeze.default, here, -1, like=node)
    return low.emit(aten.mul.Tensor, found, mask, like=node)


def groups(low: Lowering, node: Node) -> Node:
    """A convolution: as many groups as this rank has."""
    from tpcompile.rules.pointwise import op_name

    at = 8 if op_name(node) == "convolution" else 7 if op_name(node).startswith("conv_tr") else 6
    args = list(low.map(node.args))
    whole = args[at] if len(args) > at else 1
    x, w = args[0].meta["val"], args[1].meta["val"]
    if whole != 1:
        transposed = bool(args[6]) if at == 8 else at == 7
        per_group = w.shape[0] // max(1, whole) if transposed else w.shape[1]
        assert not transposed, "divided groups of transposed convolutions have no rule"
        args[at] = int(x.shape[1]) // int(per_group)
    return low.emit(node.target, *args, like=node, **low.map(node.kwargs))


def group_norm(low: Lowering, node: Node) -> Node:
    """A group norm: as many groups as this rank has."""
    args = list(low.map(node.args))
    channels = int(shape(operands(node)[0])[1])
    per_group = channels // args[1]
    args[1] = int(args[0].meta["val"].shape[1]) // per_group
    return low.emit(node.target, *args, like=node, **low.map(node.kwargs))


def sym_size(low: Lowering, node: Node) -> Any:
    """The whole size, read from a local tensor: scaled up where the dimension is divided."""
    source, dim = node.args
    assert isinstance(source, Node) and isinstance(dim, int)
    placements = source.meta.get("placement", ())
    whole, part = shape(source)[dim], low.shapes.shape(source, placements)[dim]
    read = low.emit(aten.sym_size.int, low.map(source), dim, like=node)
    if whole == part:
        return read
    ratio = sympy.cancel(sympy.sympify(whole) / sympy.sympify(part))
    scaled = low.emit(operator.mul, read, int(ratio.p), like=node)
    return low.emit(operator.floordiv, scaled, int(ratio.q), like=node)


LOCALISERS: dict[str, Callable[[Lowering, Node], Node]] = {
    "sizes": sizes,
    "split": split,
    "mean": mean,
    "lookup": lookup,
    "groups": groups,
    "group_norm": group_norm,
}

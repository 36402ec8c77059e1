"""Canonicalise: one form for things that can be written in several."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tpcompile.ir.graph_edit import call, drop_unused
from tpcompile.ir.nodes import argument, is_tensor, shape
from tpcompile.ir.sizes import sizes_of
from tpcompile.work import Work

from .pipeline import Pass

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unsafe_split.Tensor}
_COPIES = {aten.clone.default, aten.lift_fresh_copy.default, aten.detach.default, aten.alias.default}
# What each fills with; None where an argument tells. Uninitialised memory is zeroed: it is only made
# to be filled, and ranks must agree.
_NEW = {
    aten.new_empty.default: 0,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.new_full.default: None,
}


@dataclass(frozen=True)
class Canonicalise(Pass):
    """Writes one thing in one way.

    Replaces slices, views and dropouts that change nothing by their input; unequal splits by slices;
    ``type_as`` by a cast; a ``copy`` into a tensor, which torch cannot differentiate, by what is copied;
    an index by a constant single position by a slice; ``x.new_zeros`` and the like by ``full``, which
    does not need ``x``; ``-1`` in sizes by the number where it is static; a weight norm by the arithmetic
    that it is, whose sums can be divided. Drops the size that a repetition is told beforehand.
    """

    name = "canonicalise"

    def apply(self, work: Work) -> bool:
        changed = False
        for node in list(work.graph.nodes):
            if node.op != "call_function":
                continue
            if _is_identity(node):
                node.replace_all_uses_with(node.args[0])
            elif node.target in _SPLITS and _unequal(node):
                _split_to_slices(node)
            elif node.target is aten.index.Tensor and (found := _constant_position(work, node)):
                _index_to_slice(node, *found)
            elif node.target is aten.type_as.default:
                _type_as_to_cast(node)
            elif node.target is aten.copy.default:
                _copy_to_source(node)
            elif node.target in _NEW:
                _new_to_factory(node)
            elif (
                node.target is aten.repeat_interleave.self_int and node.kwargs.get("output_size") is not None
            ):
                node.kwargs = {k: v for k, v in node.kwargs.items() if k != "output_size"}
                changed = True
            elif node.target is aten._weight_norm_interface.default:
                _weight_norm_to_arithmetic(node)
            elif node.target in _VIEWS and _state_sizes(node):
                changed = True
        return drop_unused(work.graph) or changed


def _is_identity(node: Node) -> bool:
    source = argument(node, 0, "self")
    if not is_tensor(node) or not isinstance(source, Node) or not is_tensor(source):
        return False
    same = shape(source) == shape(node)
    if node.target is aten.slice.Tensor or node.target in _VIEWS or node.target is aten.expand.default:
        return same
    if node.target is aten.dropout.default:
        return bool(node.args[1] == 0 or not node.args[2])
    return node.target in (aten.alias.default, aten.contiguous.default, aten.lift_fresh_copy.default)


def _parts(node: Node) -> list[Any]:
    dim = argument(node, 2, "dim", 0)
    return [sizes_of(t)[dim] for t in node.meta["val"]]


def _unequal(node: Node) -> bool:
    parts = _parts(node)
    return all(isinstance(p, int) for p in parts) and len(set(parts)) > 1


def _split_to_slices(node: Node) -> None:
    graph, dim = node.graph, argument(node, 2, "dim", 0)
    starts = [0]
    for part in _parts(node):
        starts.append(starts[-1] + part)
    for user in list(node.users):
        assert user.target is operator.getitem
        i = argument(user, 1, "index")
        with graph.inserting_before(user):
            new = call(graph, aten.slice.Tensor, (node.args[0], dim, starts[i], starts[i + 1]), like=node)
        user.replace_all_uses_with(new)
        graph.erase_node(user)


def _constant_position(work: Work, node: Node) -> tuple[int, int] | None:
    """Dimension and position, if the only index is a constant with one element."""
    given = [(d, i) for d, i in enumerate(argument(node, 1, "indices")) if i is not None]
    if len(given) != 1:
        return None
    dim, index = given[0]
    while index.target in _COPIES:
        index = index.args[0]
    if index not in work.sources:
        return None
    source = work.sources[index].spec
    value = work.captured.constants.get(source.name) if source.kind == "constant" else None
    if value is None or tuple(value.shape) != (1,) or value.dtype == torch.bool:
        return None
    size = shape(argument(node, 0, "self"))[dim]
    return (dim, int(value) % size) if isinstance(size, int) else None


def _index_to_slice(node: Node, dim: int, position: int) -> None:
    with node.graph.inserting_before(node):
        new = call(node.graph, aten.slice.Tensor, (node.args[0], dim, position, position + 1), like=node)
    node.replace_all_uses_with(new)


def _type_as_to_cast(node: Node) -> None:
    """Of the other operand only the type counts: it need not be brought along."""
    with node.graph.inserting_before(node):
        cast = call(
            node.graph, aten._to_copy.default, (node.args[0],), {"dtype": node.meta["val"].dtype}, like=node
        )
    node.replace_all_uses_with(cast)


def _copy_to_source(node: Node) -> None:
    """Of the tensor that is copied into only shape and type count; the result may be the source itself."""
    graph, (into, source), dtype = node.graph, node.args[:2], node.meta["val"].dtype
    assert isinstance(into, Node) and isinstance(source, Node)
    with graph.inserting_before(node):
        if shape(source) != shape(into):
            source = call(graph, aten.expand_as.default, (source, into), like=node)
        if source.meta["val"].dtype != dtype:
            source = call(graph, aten._to_copy.default, (source,), {"dtype": dtype}, like=node)
    node.replace_all_uses_with(source)


def _state_sizes(node: Node) -> bool:
    """Writes static sizes as numbers, whatever they were written as."""
    old = list(argument(node, 1, "size"))
    new = [size if isinstance(size, int) else arg for arg, size in zip(old, shape(node), strict=True)]
    if new == old:
        return False
    node.args = (node.args[0], new)
    return True


def _new_to_factory(node: Node) -> None:
    fill = node.args[2] if _NEW[node.target] is None else _NEW[node.target]  # type: ignore[index]
    val = node.meta["val"]
    options = {"dtype": val.dtype, "device": val.device}
    with node.graph.inserting_before(node):
        new = call(node.graph, aten.full.default, (node.args[1], fill), options, like=node)
    node.replace_all_uses_with(new)


def _weight_norm_to_arithmetic(node: Node) -> None:
    """``v * (g / |v|)``, the norm over all dimensions but one."""
    graph = node.graph
    direction, length, kept = node.args[0], node.args[1], argument(node, 2, "dim", 0)
    assert isinstance(direction, Node) and isinstance(length, Node)
    rank, dtype = len(shape(direction)), length.meta["val"].dtype
    others = [d for d in range(rank) if d != kept % rank]
    with graph.inserting_before(node):
        # Half-precision squares are added up in single precision, as torch's kernel does.
        long = _cast(direction, torch.promote_types(dtype, torch.float32))
        square = call(graph, aten.mul.Tensor, (long, long), like=node)
        total = call(graph, aten.sum.dim_IntList, (square, others, True), like=node)
        norm = _cast(call(graph, aten.sqrt.default, (total,), like=node), dtype)
        scale = call(graph, aten.div.Tensor, (length, norm), like=node)
        weight = call(graph, aten.mul.Tensor, (direction, scale), like=node)
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(weight if argument(user, 1, "index") == 0 else norm)
        graph.erase_node(user)


def _cast(value: Node, dtype: torch.dtype) -> Node:
    if value.meta["val"].dtype == dtype:
        return value
    return call(value.graph, aten._to_copy.default, (value,), {"dtype": dtype}, like=value)

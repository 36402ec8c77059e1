"""Canonicalise: one form for things that can be written in several."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tpcompile.capture.export.aliases import may_alias
from tpcompile.ir.graph_edit import call_before, cast_before, drop_unused, replace
from tpcompile.ir.nodes import argument, arguments, is_tensor, shape
from tpcompile.ir.sizes import sizes_of
from tpcompile.planner.global_program import GlobalProgram, Pass

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

    def apply(self, program: GlobalProgram) -> bool:
        changed = False
        for node in program.graph.nodes:
            if node.op == "call_function" and _rewrite(program, node):
                changed = True
        return drop_unused(program.graph) or changed


def _rewrite(program: GlobalProgram, node: Node) -> bool:
    """Rewrites a call, if there is another form for it."""
    if _is_identity(node):
        replace(node, node.args[0])  # type: ignore[arg-type]
        return True
    rewrite = _REWRITES.get(node.target)
    return rewrite is not None and rewrite(program, node)


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


def _split_to_slices(program: GlobalProgram, node: Node) -> bool:
    """An unequal split becomes slices."""
    dim = argument(node, 2, "dim", 0)
    parts = [sizes_of(t)[dim] for t in node.meta["val"]]
    if not all(isinstance(p, int) for p in parts) or len(set(parts)) < 2:
        return False
    bounds = itertools.pairwise([0, *itertools.accumulate(parts)])
    replace(node, *(call_before(node, aten.slice.Tensor, node.args[0], dim, *each) for each in bounds))
    return True


def _index_to_slice(program: GlobalProgram, node: Node) -> bool:
    found = _constant_position(program, node)
    if found is not None:
        dim, position = found
        replace(node, call_before(node, aten.slice.Tensor, node.args[0], dim, position, position + 1))
    return found is not None


def _constant_position(program: GlobalProgram, node: Node) -> tuple[int, int] | None:
    """Dimension and position, if the only index is a constant with one element."""
    given = [(d, i) for d, i in enumerate(argument(node, 1, "indices")) if i is not None]
    if len(given) != 1:
        return None
    dim, index = given[0]
    while index.target in _COPIES:
        index = index.args[0]
    if index not in program.sources:
        return None
    source = program.sources[index].spec
    value = program.captured.constants.get(source.name) if source.kind == "constant" else None
    if value is None or tuple(value.shape) != (1,) or value.dtype == torch.bool:
        return None
    size = shape(argument(node, 0, "self"))[dim]
    return (dim, int(value) % size) if isinstance(size, int) else None


def _type_as_to_cast(program: GlobalProgram, node: Node) -> bool:
    """Of the other operand only the type counts: it need not be brought along."""
    replace(node, call_before(node, aten._to_copy.default, node.args[0], dtype=node.meta["val"].dtype))
    return True


def _copy_to_source(program: GlobalProgram, node: Node) -> bool:
    """Of the tensor that is copied into only shape and type count; a result has memory of its own."""
    into, source = arguments(node)[:2]
    if shape(source) != shape(into):
        source = call_before(node, aten.expand_as.default, source, into)
    copied = cast_before(node, source, node.meta["val"].dtype)
    if copied is source and _is_handed_out(program, node):
        copied = call_before(node, aten.clone.default, copied)
    replace(node, copied)
    return True


def _is_handed_out(program: GlobalProgram, value: Node) -> bool:
    """Whether a value, or a view of it, is a result, which the caller may write."""
    if any(user.op == "output" for user in value.users):
        outputs = zip(program.outputs(), program.captured.outputs, strict=True)
        if any(out is value and spec.kind in ("user", "attribute") for out, spec in outputs):
            return True
    return any(may_alias(user) and _is_handed_out(program, user) for user in value.users)


def _state_sizes(program: GlobalProgram, node: Node) -> bool:
    """Writes static sizes as numbers, whatever they were written as."""
    old = list(argument(node, 1, "size"))
    new = [size if isinstance(size, int) else arg for arg, size in zip(old, shape(node), strict=True)]
    node.args = (node.args[0], new)
    return new != old


def _new_to_factory(program: GlobalProgram, node: Node) -> bool:
    fill = node.args[2] if _NEW[node.target] is None else _NEW[node.target]  # type: ignore[index]
    val = node.meta["val"]
    full = aten.full.default
    replace(node, call_before(node, full, node.args[1], fill, dtype=val.dtype, device=val.device))
    return True


def _without_size(program: GlobalProgram, node: Node) -> bool:
    told = node.kwargs.get("output_size") is not None
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "output_size"}
    return told


def _weight_norm_to_arithmetic(program: GlobalProgram, node: Node) -> bool:
    """``v * (g / |v|)``, the norm over all dimensions but one."""
    direction, length, *_ = arguments(node)
    kept, rank, dtype = argument(node, 2, "dim", 0), len(shape(direction)), length.meta["val"].dtype
    others = [d for d in range(rank) if d != kept % rank]
    # Half-precision squares are added up in single precision, as torch's kernel does.
    long = cast_before(node, direction, torch.promote_types(dtype, torch.float32))
    square = call_before(node, aten.mul.Tensor, long, long)
    total = call_before(node, aten.sum.dim_IntList, square, others, True)
    norm = cast_before(node, call_before(node, aten.sqrt.default, total), dtype)
    scale = call_before(node, aten.div.Tensor, length, norm)
    replace(node, call_before(node, aten.mul.Tensor, direction, scale), norm)
    return True


_REWRITES: dict[Any, Callable[[GlobalProgram, Node], bool]] = {
    **dict.fromkeys(_SPLITS, _split_to_slices),
    **dict.fromkeys(_NEW, _new_to_factory),
    **dict.fromkeys(_VIEWS, _state_sizes),
    aten.index.Tensor: _index_to_slice,
    aten.type_as.default: _type_as_to_cast,
    aten.copy.default: _copy_to_source,
    aten.repeat_interleave.self_int: _without_size,
    aten._weight_norm_interface.default: _weight_norm_to_arithmetic,
}

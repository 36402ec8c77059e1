"""FlattenStrided: what reads memory by strides reads a flat value, whose memory is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from tpcompile.errors import CannotCapture
from tpcompile.ir.graph_edit import call_before
from tpcompile.ir.nodes import argument, module_path, shape
from tpcompile.ir.sizes import Size, size_of
from tpcompile.planner.global_program import GlobalProgram, Pass

aten = torch.ops.aten
_READS = (aten.as_strided.default, aten.as_strided_copy.default)
_WRITE = aten.as_strided_scatter.default


@dataclass(frozen=True)
class FlattenStrided(Pass):
    """Replaces ``as_strided(x, ...)`` by ``as_strided(reshape(permute(x), [-1]), ...)``.

    ``as_strided`` reads the elements of ``x`` in the order in which they are in memory. Other passes keep
    values, not their memory: a gathered value is contiguous, whatever it was. The elements in that order as
    a flat value have only one order. Runs first, while strides are those of the capture.

    Raises:
        CannotCapture: a value has gaps in memory, is written by strides, or read beyond its elements.
    """

    name = "flatten-strided"

    def apply(self, program: GlobalProgram) -> bool:
        strided = [node for node in program.graph.nodes if node.target in (*_READS, _WRITE)]
        todo = [node for node in strided if not _reads_flat(node)]
        for node in todo:
            _flatten(node)
        return bool(todo)


def _reads_flat(node: Node) -> bool:
    val = node.args[0].meta["val"]  # type: ignore[union-attr]
    return val.ndim == 1 and val.stride() == (1,) and argument(node, 3, "storage_offset") is None


def _flatten(node: Node) -> None:
    source = node.args[0]
    assert isinstance(source, Node)
    order = None if node.target is _WRITE else _memory_order(source)
    start = None if order is None else _start(node, source)
    if order is None or start is None:
        raise CannotCapture(
            f"{node.target} writes memory by strides, or reads beyond the value or into its gaps",
            where=module_path(node),
            todo="use views, unfold or an index instead",
        )
    flat = call_before(node, aten.permute.default, source, order)
    flat = call_before(node, aten.reshape.default, flat, [-1])
    if start != 0:  # as no node is
        flat = call_before(node, aten.slice.Tensor, flat, 0, start)
    node.args, node.kwargs = (flat, *node.args[1:3]), {}


def _start(node: Node, source: Node) -> int | Node | None:
    """Where the first element that is read stands in the value; None if others are read, too."""
    offset, own = argument(node, 3, "storage_offset"), source.meta["val"].storage_offset()
    start: Any
    if offset is None:
        start = 0
    elif isinstance(offset, Node):
        start = offset if isinstance(own, int) and own == 0 else None
    else:
        start = offset - own if isinstance(own, int) and offset >= own else None
    if start is None:
        return None
    sizes, strides = (
        [_given(s) for s in argument(node, i, name)] for i, name in ((1, "size"), (2, "stride"))
    )
    last = _given(start) + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    beyond = sympy.expand(last + 1 - sympy.prod(shape(source)))
    return None if beyond.is_number and beyond > 0 else start


def _given(size: int | Node) -> Size:
    """A size among a call's arguments."""
    return size_of(size.meta["val"] if isinstance(size, Node) else size)


def _memory_order(source: Node) -> list[int] | None:
    """The dimensions of a value as they are in memory, major first; None if there are gaps."""
    sizes, strides = shape(source), [size_of(s) for s in source.meta["val"].stride()]
    waiting, order = list(range(len(sizes))), list[int]()
    covered: Size = 1
    while waiting:
        # A dimension of one element has any stride.
        dim = next((d for d in waiting if sizes[d] == 1 or sympy.expand(strides[d] - covered) == 0), None)
        if dim is None:
            return None
        waiting.remove(dim)
        order.insert(0, dim)
        covered *= sizes[dim]
    return order

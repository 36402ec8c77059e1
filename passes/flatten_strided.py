"""FlattenStrided: what reads memory by strides reads a flat value, whose memory is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from tpcompile.errors import CannotCapture
from tpcompile.graph_edit import call, module_path
from tpcompile.rules.rule import argument, shape
from tpcompile.work import Work

from .pipeline import Pass

aten = torch.ops.aten
_READS = (aten.as_strided.default, aten.as_strided_copy.default)
_WRITES = (aten.as_strided_scatter.default,)


@dataclass(frozen=True)
class FlattenStrided(Pass):
    """Replaces ``as_strided(x, ...)`` by ``as_strided(reshape(permute(x), [-1]), ...)``.

    ``as_strided`` reads the elements of ``x`` in the order in which they lie in memory. Other passes keep
    values, not their memory: a gathered value is contiguous, whatever it was. The elements in that order as
    a flat value have only one way to lie. Runs first, while strides are those of the capture.

    Raises:
        CannotCapture: a value has gaps in memory, or is written by strides.
    """

    name = "flatten-strided"

    def apply(self, work: Work) -> bool:
        strided = [node for node in work.graph.nodes if node.target in (*_READS, *_WRITES)]
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
    order = None if node.target in _WRITES else _memory_order(source)
    if order is None:
        raise CannotCapture(
            f"{node.target} reads or writes memory by strides, which have gaps",
            where=module_path(node),
            todo="use views, unfold or an index instead",
        )
    own = source.meta["val"].storage_offset()
    start = argument(node, 3, "storage_offset", own) - own
    with node.graph.inserting_before(node):
        flat = call(node.graph, aten.permute.default, (source, order), like=node)
        flat = call(node.graph, aten.reshape.default, (flat, [-1]), like=node)
        if start != 0:
            flat = call(node.graph, aten.slice.Tensor, (flat, 0, start), like=node)
    node.args, node.kwargs = (flat, *node.args[1:3]), {}


def _memory_order(source: Node) -> list[int] | None:
    """The dimensions of a value as they lie in memory, major first; None if there are gaps."""
    sizes, strides = shape(source), [_expression(s) for s in source.meta["val"].stride()]
    waiting, covered = list(range(len(sizes))), sympy.Integer(1)
    order: list[int] = []
    while waiting:
        # A dimension of one element has any stride.
        dim = next((d for d in waiting if sizes[d] == 1 or sympy.expand(strides[d] - covered) == 0), None)
        if dim is None:
            return None
        waiting.remove(dim)
        order.insert(0, dim)
        covered *= sizes[dim]
    return order


def _expression(size: Any) -> sympy.Expr:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)

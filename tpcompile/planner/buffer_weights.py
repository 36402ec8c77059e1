"""Weights that are kept in buffers, as layers of eight bits have them: they are divided as parameters are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.fx import Node

from tpcompile.ir.layout.segment import whole_segment
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.nodes import operands, shape, tensor_of
from tpcompile.rules.rule import Rule

from .global_program import GlobalProgram
from .search.must_divide import matrix, weight_roots

ATTENTION = (torch.ops.aten.scaled_dot_product_attention.default,)
"""A contraction of which an operand is no weight: its mask."""


def find_buffer_weights(program: GlobalProgram) -> None:
    """Marks the buffers that are to be divided: saved matrices that a contraction uses, and nobody writes.

    Tables that are not saved (rotary frequencies) follow from the configuration, and are small.
    """
    written = {spec.name for spec in program.captured.outputs if spec.kind == "buffer_mutation"}
    found = {
        node
        for node, source in program.sources.items()
        if source.spec.kind == "buffer" and source.spec.saved and source.spec.name not in written
        if source.segment is None and matrix(node)
    }
    if found:
        _mark(program, set(_used_as_weights(program, found)))


def _used_as_weights(program: GlobalProgram, buffers: set[Node]) -> Iterator[Node]:
    for node, rule in program.factors().rules.items():
        if not (isinstance(rule, Rule) and rule.contraction) or node.target in ATTENTION:
            continue
        for operand in operands(node):
            if rule.localize != "lookup" or tensor_of(operand).is_floating_point():  # not what is looked up
                yield from weight_roots(operand, buffers)


def mark_divided_buffers(program: GlobalProgram, layout: WeightLayout) -> None:
    """Marks the buffers that an earlier program has divided, whatever this one does with them."""
    buffers = {node: s.spec.name for node, s in program.sources.items() if s.spec.kind == "buffer"}
    divided = {n for n, name in buffers.items() if name in layout.params and not layout.params[name].is_whole}
    _mark(program, divided)


def _mark(program: GlobalProgram, buffers: set[Node]) -> None:
    for node, source in program.sources.items():
        if node in buffers and source.segment is None:
            sizes = [int(size) for size in shape(node)]
            program.sources[node] = replace(source, segment=whole_segment(sizes, 0))

"""JoinSegments: a parameter that is held in segments, for a program that uses it in one piece."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from tpcompile.ir.graph_edit import call
from tpcompile.ir.layout.segment import Box, Segment
from tpcompile.ir.layout.weight_layout import ParamLayout, WeightLayout
from tpcompile.planner.global_program import GlobalProgram, Pass

from .split_packed_matmul import segment_placeholder

aten = torch.ops.aten


@dataclass(frozen=True)
class JoinSegments(Pass):
    """Replaces a parameter by ``cat`` of its segments, where an earlier program has divided these.

    Fires for programs that do not take a packed parameter apart, or do so elsewhere.
    """

    name = "join-segments"
    layout: WeightLayout

    def apply(self, program: GlobalProgram) -> bool:
        pieces = {n: s.spec.name for n, s in program.sources.items() if s.segment is not None and s.order < 0}
        held = {
            n: self.layout.params[name] for n, name in pieces.items() if name not in self.layout.undecided
        }
        packed = {n: param for n, param in held.items() if len(param.segments) > 1}
        for node, param in packed.items():
            _join(program, node, param)
        return bool(packed)


def _join(program: GlobalProgram, param: Node, layout: ParamLayout) -> None:
    dim, graph = layout.packed_dim, program.graph
    sizes, ranges = layout.segments[0].factors[dim], [_ranges(s, dim) for s in layout.segments]
    cut = next(i for i, size in enumerate(sizes) if ranges[0][i] != (0, size))
    parts = [segment_placeholder(program, param, s, order) for order, s in enumerate(layout.segments)]
    user = next(iter(param.users), None)
    if user is not None:
        with graph.inserting_before(user):
            if len(sizes) > 1:  # parts of every head, say
                opened = [[stop - start for start, stop in each] for each in ranges]
                parts = [
                    call(graph, aten.unflatten.int, (part, dim, into), like=user)
                    for part, into in zip(parts, opened, strict=True)
                ]
            whole = call(graph, aten.cat.default, (parts, dim + cut), like=user)
            if len(sizes) > 1:
                whole = call(graph, aten.flatten.using_ints, (whole, dim, dim + len(sizes) - 1), like=user)
        param.replace_all_uses_with(whole)
    program.packed_dims[layout.name] = dim
    del program.sources[param]
    graph.erase_node(param)


def _ranges(segment: Segment, dim: int) -> Box:
    """What a segment has of each factor of a dimension."""
    at = sum(len(d) for d in segment.factors[:dim])
    return segment.box[at : at + len(segment.factors[dim])]

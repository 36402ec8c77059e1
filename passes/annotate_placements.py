"""AnnotatePlacements: writes the planner's decisions into the graph."""

from __future__ import annotations

from dataclasses import dataclass

from tpcompile.ir.nodes import is_tensor, producer
from tpcompile.planner.global_program import GlobalProgram, Pass


@dataclass(frozen=True)
class AnnotatePlacements(Pass):
    """Gives every tensor its placements (``meta["placement"]``) and every call its choices."""

    name = "annotate-placements"

    def apply(self, program: GlobalProgram) -> bool:
        for node in program.graph.nodes:
            if node.op == "output":
                continue
            if is_tensor(node):
                node.meta["placement"] = tuple(d.output(node) for d in program.decisions)
            owner, _ = producer(node)
            if node.op == "call_function" and owner is node:
                node.meta["choices"] = tuple(d.nodes.get(node) for d in program.decisions)
        return True

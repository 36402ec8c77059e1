"""InsertReshards: abstract conversions where a value is not placed as its user wants it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from tpcompile.capture.repeats.blocks import BLOCK, block_of
from tpcompile.ir.graph_edit import call_behind, with_operands
from tpcompile.ir.markers import Placements, reshard
from tpcompile.ir.nodes import is_tensor, operands
from tpcompile.ir.placements import R
from tpcompile.planner.global_program import GlobalProgram, Pass
from tpcompile.planner.search.facts import SHAPE_ONLY


@dataclass(frozen=True)
class InsertReshards(Pass):
    """Inserts ``reshard(x, from, to)`` where producer and consumer differ, shared by equal wants.

    A value with several uses is first brought to the placement that the planner chose to hand it on
    in, then for each use to the one that it wants; a use that wants it as it was computed takes it so.
    Conversions stand right behind what they convert: most of them shrink it.
    """

    name = "insert-reshards"

    def apply(self, program: GlobalProgram) -> bool:
        inserter = _Inserter(program)
        for node in list(program.graph.nodes):
            if node.op == "output":
                inserter.results(node)
            elif node.meta.get("choices") and node.target not in SHAPE_ONLY:
                inserter.operands(node)
        of_layers = _results_of_layers(program)
        for node in reversed(inserter.made.values()):
            if node not in of_layers:
                _move_between_layers(node)
        return bool(inserter.made)


def _results_of_layers(program: GlobalProgram) -> set[object]:
    """The results of the program that every layer has, such as its part of a cache."""
    shared = program.blocks.shared if program.blocks is not None else ()
    return {program.outputs()[at] for at in shared}


def _move_between_layers(node: Node) -> None:
    """A conversion of what one layer hands on belongs to the next, or behind all layers, as its users do."""
    blocks = {block_of(user) for user in node.users}
    if len(blocks) != 1:
        return
    block = blocks.pop()
    if block is None:
        node.meta.pop(BLOCK, None)
    else:
        node.meta[BLOCK] = block


class _Inserter:
    def __init__(self, program: GlobalProgram) -> None:
        self.program = program
        self.whole: Placements = (R,) * len(program.decisions)
        self.made: dict[tuple[Node, Placements], Node] = {}

    def operands(self, node: Node) -> None:
        """Brings a call's operands to where its choices want them."""
        given = operands(node)
        wants = (tuple(d.need(node, i) for d in self.program.decisions) for i in range(len(given)))
        node.args, node.kwargs = with_operands(node, map(self.bring, given, wants))

    def results(self, node: Node) -> None:
        """Brings the program's results to where the caller wants them: whole, caches as they are."""
        divided = self.program.handed_out()

        def brought(out: Any) -> Any:
            is_value = isinstance(out, Node) and is_tensor(out)
            return self.bring(out, divided.get(out, self.whole)) if is_value else out

        node.args = (tuple(brought(out) for out in self.program.outputs()),)

    def bring(self, value: Node, want: Placements) -> Node:
        """The value in a placement, by way of the one in which it is handed on."""
        own = value.meta["placement"]
        if want == own:
            return value
        shared = tuple(d.shared.get(value, mine) for d, mine in zip(self.program.decisions, own, strict=True))
        return self._convert(self._convert(value, own, shared), shared, want)

    def _convert(self, value: Node, src: Placements, dst: Placements) -> Node:
        if src == dst:
            return value
        key = (value, dst)
        if key not in self.made:
            self.made[key] = call_behind(value, reshard, value, src, dst, placement=dst)
        return self.made[key]

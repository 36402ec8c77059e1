"""InsertReshards: abstract conversions where a value is not placed as its user wants it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tpcompile.graph_edit import call
from tpcompile.markers import Placements, reshard
from tpcompile.placements import R
from tpcompile.rules.rule import operands
from tpcompile.work import Work, is_tensor

from .pipeline import Pass


@dataclass(frozen=True)
class InsertReshards(Pass):
    """Inserts ``reshard(x, from, to)`` where producer and consumer differ, shared by equal wants.

    A value with several uses is first brought to the placement that the planner chose to hand it on
    in, then for each use to the one that it wants; conversions between equal placements are left out.
    """

    name = "insert-reshards"

    def apply(self, work: Work) -> bool:
        inserter = _Inserter(work)
        for node in list(work.graph.nodes):
            if node.op == "output":
                inserter.results(node)
            elif node.meta.get("strategies") or (node.op == "call_function" and operands(node)):
                inserter.operands(node)
        return True


class _Inserter:
    def __init__(self, work: Work) -> None:
        self.work = work
        self.whole: Placements = (R,) * len(work.decisions)
        self.made: dict[tuple[Node, Placements], Node] = {}

    def operands(self, node: Node) -> None:
        if "strategies" not in node.meta:  # a getitem
            return
        index = -1
        wants = [tuple(d.need(node, i) for d in self.work.decisions) for i in range(len(operands(node)))]

        def swap(arg: Any) -> Any:
            nonlocal index
            if not (isinstance(arg, Node) and is_tensor(arg)):
                return arg
            index += 1
            return self.bring(arg, wants[index])

        node.args, node.kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), swap)

    def results(self, node: Node) -> None:
        free = self.work.free_outputs()
        node.args = (
            tuple(
                self.bring(out, self.whole)
                if isinstance(out, Node) and is_tensor(out) and out not in free
                else out
                for out in self.work.outputs()
            ),
        )

    def bring(self, value: Node, want: Placements) -> Node:
        """The value in a placement, by way of the one in which it is handed on."""
        own = value.meta["placement"]
        shared = tuple(d.shared.get(value, mine) for d, mine in zip(self.work.decisions, own, strict=True))
        return self.convert(self.convert(value, own, shared), shared, want)

    def convert(self, value: Node, src: Placements, dst: Placements) -> Node:
        if src == dst:
            return value
        key = (value, dst)
        if key not in self.made:
            with value.graph.inserting_before(self._behind(value)):
                node = call(value.graph, reshard, (value, src, dst), like=value)
            node.meta["placement"] = dst
            self.made[key] = node
        return self.made[key]

    def _behind(self, value: Node) -> Node:
        """The node before which something computed from the value can stand."""
        after = value.next
        while after.op == "placeholder":
            after = after.next
        return after

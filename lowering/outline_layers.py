"""Keeps repeated layers of a lowered graph as calls of one submodule, so that they are compiled once.

Without it Dynamo, AOTAutograd and Inductor see every layer, and compiling takes time in proportion. The
submodule is a ``nested_compile_region``: torch traces and compiles it at its first call and stamps out the
result for the others, forward and backward. What is given up is fusion across the borders of layers.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from tpcompile.capture.repeats.unroll_layers import Unrolled
from tpcompile.ir.graph_edit import copied, delay_readers

from .take_out import take_out

FEWEST = 7
"""Fewer layers stay as they are: they compile quickly, and Inductor may fuse across their borders."""


def as_region(body: GraphModule, count: int) -> GraphModule:
    """The program, marked so that torch compiles it once for all of its calls.

    Args:
        body: what one period of layers computes; its class is its own, so that no other code is marked.
        count: how often it is called: torch may have to trace it anew as often, and gives up after that.
    """
    kind: Any = type(body)
    region: Any = torch.compiler.nested_compile_region
    limited = "max_reuse_entries" in inspect.signature(region).parameters  # torch 2.11 has no limit
    kind.forward = region(kind.forward, **({"max_reuse_entries": count} if limited else {}))
    return body


def outline(whole: Graph, lists: Sequence[Unrolled]) -> GraphModule | None:
    """A copy of a program in which long lists of layers are calls of a submodule each (``layers_0``, ...).

    Args:
        whole: a rank's graph with all layers.
        lists: which nodes of it are copies of which, as ``unroll`` says.

    Returns:
        The program; None if there is nothing to outline. A list stays as it is if its layers hand on views
        of what they are given, or other things than tensors: torch does not compile such a submodule.
    """
    graph, moved = copied(whole)
    root = nn.Module()
    for number, one in enumerate(lists):
        periods = [{moved[k]: moved[v] for k, v in period.items()} for period in one.periods]
        layers = _Layers([moved[node] for node in one.calls], periods)
        if len(periods) >= FEWEST and layers.fit():
            name = f"layers_{number}"
            setattr(root, name, as_region(layers.body(), len(periods)))
            layers.replace(graph, name)
    if not list(root.children()):
        return None
    graph.lint()
    return GraphModule(root, graph, "OutlinedProgram")


class _Layers:
    """One list of layers.

    Args:
        calls: the nodes of the period that is the pattern of all, in the graph's order.
        periods: what these are in every period, in order.
    """

    def __init__(self, calls: list[Node], periods: list[dict[Node, Node]]) -> None:
        self.calls, self.periods = calls, periods
        self.members = [{period[node] for node in calls} for period in periods]
        inside = set(calls)
        self.operands = list(dict.fromkeys(n for c in calls for n in _inputs(c) if n not in inside))
        # By number, because the pattern's own operands are replaced on the way.
        number = {node: at for at, node in enumerate(self.operands)}
        self.numbers = [[number.get(n) for n in _inputs(c)] for c in calls]
        self.results = [node for node in calls if self._is_read(node)]

    def _is_read(self, node: Node) -> bool:
        """Whether something outside of a period reads its result in any of them."""
        return any(
            user not in members
            for period, members in zip(self.periods, self.members, strict=True)
            for user in period[node].users
        )

    def fit(self) -> bool:
        """Whether torch can compile them as a region: tensors out, none of them a view of another or of
        what goes in."""
        values = [node.meta.get("val") for node in self.results]
        if not values or not all(isinstance(value, Tensor) for value in values):
            return False
        given = {_storage(node) for node in self.operands}
        handed = [_storage(node) for node in self.results]
        return len(set(handed)) == len(handed) and not given.intersection(handed)

    def body(self) -> GraphModule:
        """One period as a program of its own: operands in, results out."""
        return take_out(self.calls, self.operands, self.results, "Layer")

    def replace(self, graph: Graph, name: str) -> None:
        """Puts a call where every period is."""
        for period, members in zip(self.periods, self.members, strict=True):
            own = [period[node] for node in self.calls]
            given = {
                number: operand
                for node, numbers in zip(own, self.numbers, strict=True)
                for operand, number in zip(_inputs(node), numbers, strict=True)
                if number is not None
            }
            with graph.inserting_before(delay_readers(own)):
                call = graph.call_module(name, tuple(given[at] for at in range(len(self.operands))))
                for at, node in enumerate(self.results):
                    result = graph.call_function(operator.getitem, (call, at))
                    result.meta.update(period[node].meta)
                    readers = [user for user in period[node].users if user not in members]
                    for user in readers:
                        user.replace_input_with(period[node], result)
                    if not readers:
                        graph.erase_node(result)
            for node in reversed(own):
                graph.erase_node(node)


def _inputs(node: Node) -> list[Node]:
    """The operands of a call one by one, as often as they are given."""
    found: list[Node] = []
    torch.fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _storage(node: Node) -> Any:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else node

"""Repeats the last captured period of repeated layers as often as the model has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from tpcompile.ir.graph_edit import delay_readers

from .blocks import BLOCK, Block, Derived, RepeatedBlocks
from .match_periods import Match, match_periods, tag_by_flow

Rename = Callable[[str], str]
NewParam = Callable[[Node, Rename], Node]


@dataclass(frozen=True)
class Unrolled:
    """The equal periods of a list of layers in a whole graph.

    Attributes:
        calls: the nodes of the last captured period, in the graph's order.
        periods: for it, the one before it and all that were added, in order from the earliest: what its
            nodes and weights are there.
    """

    calls: list[Node]
    periods: list[dict[Node, Node]]


def unroll(graph: Graph, blocks: RepeatedBlocks, new_param: NewParam) -> list[Unrolled]:
    """Replace, in place, the last captured period of every repeat by as many as the model has.

    Nodes that passes inserted belong to the period in their ``meta["block"]``, else to where the data
    flow puts them.

    Args:
        graph: a captured graph, before or after passes.
        blocks: what capture said about it.
        new_param: called with a placeholder of the last captured period and with a function that turns
            that placeholder's original name (``layers.2.q.weight``) into the copy's (``layers.3.q.weight``);
            adds a placeholder to the graph and returns it. Called copy by copy, in the graph's order.

    Returns:
        Per list of layers, which nodes are copies of which.

    Raises:
        TpCompileError: the last two captured periods were rewritten differently.
    """
    tag_by_flow(graph, len(blocks.repeats))
    # Export renames nodes without telling the graph's register of names; copies would take theirs again.
    graph._graph_namespace._used_names.update(node.name for node in graph.nodes)
    # All periods are compared before the first is copied, so that an error leaves the graph as it was.
    matches = [match_periods(graph, n, repeat.kept - 1) for n, repeat in enumerate(blocks.repeats)]
    periods = [_Unroller(graph, number, blocks, match).run(new_param) for number, match in enumerate(matches)]
    _return_all(graph, blocks, periods)
    earlier = [{two: one for one, two in match.pairs.items()} for match in matches]
    return [
        Unrolled(match.calls, [before, *copies])
        for match, before, copies in zip(matches, earlier, periods, strict=True)
    ]


def _return_all(graph: Graph, blocks: RepeatedBlocks, periods: Sequence[Sequence[dict[Node, Node]]]) -> None:
    """Gives the graph the whole program's results; ``periods`` are per list the copies, original first."""
    output = graph.output_node()
    short: tuple[Any, ...] = output.args[0]  # type: ignore[assignment]

    def result(derived: Derived) -> Any:
        value = short[derived.output]
        inside = isinstance(value, Node) and derived.repeat >= 0
        return periods[derived.repeat][derived.copies].get(value, value) if inside else value

    values = tuple(map(result, blocks.results))
    output.args = (values,)
    if "val" in output.meta:
        output.meta["val"] = tuple(v.meta.get("val") if isinstance(v, Node) else v for v in values)


class _Unroller:
    def __init__(self, graph: Graph, number: int, blocks: RepeatedBlocks, match: Match) -> None:
        self.graph, self.number, self.blocks, self.match = graph, number, blocks, match
        self.repeat = blocks.repeats[number]
        self.stacks: dict[tuple[int, int], dict[str, Any]] = {}

    def run(self, new_param: NewParam) -> list[dict[Node, Node]]:
        """Adds the periods; returns for each, the original first, what its nodes and weights became."""
        calls = self.match.calls
        inside = set(calls)
        readers = [
            (node, [user for user in node.users if user not in inside and user.op != "output"])
            for node in calls
        ]
        end = delay_readers(calls)
        latest: dict[Node, Node] = {node: node for node in (*calls, *self.match.weights)}
        periods = [latest]
        for copy in range(1, self.repeat.copies + 1):
            latest = self._copy(copy, latest, end, new_param)
            periods.append(latest)
        for node, users in readers:
            for user in users:
                user.replace_input_with(node, latest[node])
        return periods

    def _copy(self, copy: int, latest: dict[Node, Node], end: Node, new_param: NewParam) -> dict[Node, Node]:
        """Adds one period before ``end``; ``latest`` holds the results of the period before it."""

        def rename(name: str) -> str:
            return self.blocks.renamed(self.number, name, copy)

        block = Block(self.number, self.repeat.kept - 1 + copy)
        new: dict[Node, Node] = {}
        for weight in self.match.weights:
            new[weight] = new_param(weight, rename)
            new[weight].meta[BLOCK] = block

        def operand(node: Node) -> Node:
            if node in self.match.carried:
                return latest[self.match.pairs[node]]
            return new.get(node, node)

        with self.graph.inserting_before(end):
            for node in self.match.calls:
                new[node] = self.graph.node_copy(node, operand)
                new[node].meta[BLOCK] = block
                if "nn_module_stack" in node.meta:
                    new[node].meta["nn_module_stack"] = self._stack(node.meta["nn_module_stack"], copy)
        return new

    def _stack(self, stack: dict[str, Any], copy: int) -> dict[str, Any]:
        """The module stack of a copy; keys such as ``L__self___layers_2`` are renamed as well."""
        key = (id(stack), copy)
        if key not in self.stacks:
            shifted = {}
            for name, (path, kind) in stack.items():
                moved = self.repeat.shifted(path, copy)
                new_key = name.replace(_flat(path), _flat(moved)) if moved != path else name
                shifted[new_key] = (moved, kind)
            self.stacks[key] = shifted
        return self.stacks[key]


def _flat(path: str) -> str:
    return path.replace(".", "_")

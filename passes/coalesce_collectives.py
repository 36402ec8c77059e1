"""CoalesceCollectives: all-reduces that are ready together travel together."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import Graph, Node

from tpcompile.graph_edit import call
from tpcompile.markers import all_reduce, all_reduce_coalesced
from tpcompile.work import Work

from .pipeline import Pass


@dataclass(frozen=True)
class CoalesceCollectives(Pass):
    """Replaces all-reduces of the same kind, none of which needs another's result, by one.

    Fires for small values (at most ``largest`` bytes for the example's sizes), where latency is what
    counts: the statistics of a query and a key norm, say. They must be of one type, on the same axes.
    """

    name = "coalesce-collectives"
    largest: int = 1 << 20

    def apply(self, work: Work) -> bool:
        changed = False
        pending: list[Node] = []
        for node in work.graph.find_nodes(op="call_function", target=all_reduce):
            if not self._small(node):
                continue
            if pending and _same_kind(pending[0], node) and not _depends(node, set(pending)):
                pending.append(node)
                continue
            changed |= _join(work.graph, pending)
            pending = [node]
        return _join(work.graph, pending) or changed

    def _small(self, node: Node) -> bool:
        val = node.meta["val"]
        count = 1
        for size in val.shape:
            count *= size if isinstance(size, int) else size.node.hint
        return bool(count * val.element_size() <= self.largest)


def _same_kind(a: Node, b: Node) -> bool:
    return a.args[1:] == b.args[1:] and a.meta["val"].dtype == b.meta["val"].dtype


def _depends(node: Node, on: set[Node]) -> bool:
    """Whether a value needs one of the others; looks back only as far as the first of them."""
    first = next(n for n in node.graph.nodes if n in on)
    position = {n: i for i, n in enumerate(node.graph.nodes)}
    stack, seen = [node], set()
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in on:
                return True
            if source not in seen and position[source] > position[first]:
                seen.add(source)
                stack.append(source)
    return False


def _join(graph: Graph, nodes: list[Node]) -> bool:
    """Puts one collective behind the last value that it needs, and everything that waited behind it."""
    if len(nodes) < 2:
        return False
    values = [n.args[0] for n in nodes]
    with graph.inserting_before(nodes[-1]):
        joined = call(graph, all_reduce_coalesced, (values, *nodes[0].args[1:]), like=nodes[-1])
        for i, node in enumerate(nodes):
            part = call(graph, operator.getitem, (joined, i), like=node)
            part.meta["placement"] = node.meta["placement"]
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)
    _sink_users(graph, joined)
    return True


def _sink_users(graph: Graph, joined: Node) -> None:
    """Moves behind the collective what stood before it and uses its results, keeping the order."""
    position = {n: i for i, n in enumerate(graph.nodes)}
    moved: set[Node] = set()
    parts = [joined, *joined.users]
    late = {*parts}
    before = [n for n in graph.nodes if position[n] < position[joined]]
    for node in before:
        if any(i in late for i in node.all_input_nodes):
            late.add(node)
            moved.add(node)
    anchor = list(joined.users)[-1]
    for node in before:
        if node in moved:
            anchor.append(node)
            anchor = node

"""CoalesceCollectives: all-reduces that are ready together travel together."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
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
        groups = list(_independent(work.graph, self.largest))
        for group in groups:
            _join(work.graph, group)
        return bool(groups)


def _independent(graph: Graph, largest: int) -> Iterator[list[Node]]:
    """Runs of small all-reduces of one kind that do not need each other's results.

    Runs are found in the graph's order and do not interleave. So joining one, which makes its results
    depend on all its operands, cannot make a member of another depend on a second one.
    """
    group: list[Node] = []
    needing: set[Node] = set()  # members of the group, and what is computed from them
    for node in graph.nodes:
        needs = any(i in needing for i in node.all_input_nodes)
        if node.target is all_reduce and _size(node) <= largest:
            if not group or needs or _kind(group[0]) != _kind(node):
                if len(group) > 1:
                    yield group
                group, needing = [], set()
            group.append(node)
            needing.add(node)
        elif needs:
            needing.add(node)
    if len(group) > 1:
        yield group


def _kind(node: Node) -> tuple[object, ...]:
    return (*node.args[1:], node.meta["val"].dtype)


def _size(node: Node) -> float:
    """Bytes for the example's sizes; a size that only a run can tell counts as endless."""
    val = node.meta["val"]
    count: float = val.element_size()
    for size in val.shape:
        hint = size.node.hint if isinstance(size, torch.SymInt) else size
        count *= float("inf") if hint is None else hint
    return count


def _join(graph: Graph, nodes: list[Node]) -> None:
    """Puts one collective in the place of the last of several, and behind it what waits for any of them."""
    first, last = nodes[0], nodes[-1]
    between = list(_between(first, last))
    with graph.inserting_before(last):
        joined = call(graph, all_reduce_coalesced, ([n.args[0] for n in nodes], *first.args[1:]), like=last)
        parts = [call(graph, operator.getitem, (joined, i), like=n) for i, n in enumerate(nodes)]
    for node, part in zip(nodes, parts, strict=True):
        part.meta["placement"] = node.meta["placement"]
        node.replace_all_uses_with(part)
    late = set(parts)
    anchor = parts[-1]
    for node in between:
        if any(i in late for i in node.all_input_nodes):
            late.add(node)
            anchor.append(node)
            anchor = node
    for node in nodes:
        graph.erase_node(node)


def _between(first: Node, last: Node) -> Iterator[Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next

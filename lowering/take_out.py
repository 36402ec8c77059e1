"""Calls of a graph as a program of their own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.fx import Graph, GraphModule, Node


def take_out(
    calls: Sequence[Node], operands: Sequence[Node], results: Sequence[Node], name: str
) -> GraphModule:
    """A program that computes what some calls of a graph do.

    Args:
        calls: in the graph's order.
        operands: what it is given: all values that they read beside their own.
        results: what it returns, as a tuple.
        name: its class.
    """
    graph = Graph()
    inside: dict[Node, Node] = {}
    for node in operands:
        inside[node] = graph.placeholder(node.name)
        inside[node].meta.update(node.meta)
    for node in calls:
        inside[node] = graph.node_copy(node, inside.__getitem__)
    graph.output(tuple(inside[node] for node in results))
    graph.lint()
    return GraphModule(nn.Module(), graph, name)

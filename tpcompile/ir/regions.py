"""Regions of a graph: calls that are computed again in backward, instead of keeping what they computed."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .graph_edit import move_behind, readers_among

_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)
REGION = "tpcompile_region"
"""The key in ``node.meta["custom"]`` under which the name of a node's region is."""


class Region(NamedTuple):
    """A region of a whole graph.

    Attributes:
        name: the mark that its nodes have.
        block: the period of repeated layers, if they are in one: copies of a layer have its marks.
    """

    name: str
    block: Any = None


def mark(node: Node, name: str | None) -> None:
    """Puts a node into a region; None: into no region."""
    others = {k: v for k, v in (node.meta.get("custom") or {}).items() if k != REGION}
    node.meta["custom"] = others if name is None else {**others, REGION: name}


def mark_of(node: Node) -> str | None:
    """The name of a node's region."""
    found: str | None = (node.meta.get("custom") or {}).get(REGION)
    return found


def region_of(node: Node) -> Region | None:
    """The region that a node of a whole graph belongs to."""
    name = mark_of(node)
    return None if name is None else Region(name, node.meta.get("block"))


def members_of(graph: Graph) -> dict[Region, list[Node]]:
    """The calls of every region, in the graph's order."""
    found: dict[Region, list[Node]] = {}
    for node in graph.nodes:
        region = region_of(node) if node.op == "call_function" else None
        if region is not None:
            found.setdefault(region, []).append(node)
    return found


def join_regions(graph: Graph) -> tuple[str, ...]:
    """Moves each region's calls together, in place; one that needs something in between is not a region.

    Sizes that follow from a region's operands are taken out of it, so that others can read them.

    Returns:
        Which regions cannot be computed by themselves, and why.
    """
    refused: dict[str, str] = {}
    for region, calls in members_of(graph).items():
        inside = _without_sizes(calls)
        if inside and (why := _complete(inside, region)) is not None:
            _refuse(inside, why, refused)
        elif inside:
            _bring_together(inside)
    for calls in members_of(graph).values():
        if any(one.next is not two for one, two in itertools.pairwise(calls)):
            _refuse(calls, "others run at the same time and exchange values with it", refused)
    return tuple(f"{path or 'a part of forward'} is not recomputed: {why}" for path, why in refused.items())


def _refuse(calls: Collection[Node], why: str, refused: dict[str, str]) -> None:
    refused.setdefault(where(calls), why)
    for call in calls:
        mark(call, None)


def where(calls: Collection[Node]) -> str:
    """The innermost module that all calls of a region were traced in."""
    paths = [[str(entry[0]) for entry in (c.meta.get("nn_module_stack") or {}).values()] for c in calls]
    shared = [steps[0] for steps in zip(*paths, strict=False) if len(set(steps)) == 1]
    return shared[-1] if shared else ""


def _without_sizes(calls: Collection[Node]) -> set[Node]:
    """The calls of a region but for sizes that follow from its operands, which belong to no region."""
    inside = set(calls)
    for call in calls:
        if isinstance(call.meta.get("val"), _NUMBERS) and not inside.intersection(call.all_input_nodes):
            inside.remove(call)
            mark(call, None)
    return inside


def _complete(inside: set[Node], region: Region) -> str | None:
    """Adds what stands between calls of a region and is needed there; says why that cannot be."""
    span = _span(inside)
    before: set[Node] = set()
    for node in reversed(span):
        if any(user in inside or user in before for user in node.users):
            before.add(node)
    for node in [n for n in readers_among(span, inside) if n in before]:
        if region_of(node) not in (None, region):
            return f"{node} of {where([node])}, which is computed by itself, stands between its calls"
        _add(node, inside, region)
    for node in [user for n in inside for user in n.users if user.target is operator.getitem]:
        _add(node, inside, region)
    read = [n for n in inside if any(user not in inside for user in n.users)]
    numbers = [n for n in read if not isinstance(n.meta.get("val"), Tensor)]
    return f"others read {min(numbers)}, which is not a tensor" if numbers else None


def _add(node: Node, inside: set[Node], region: Region) -> None:
    mark(node, region.name)
    node.meta["block"] = region.block
    inside.add(node)


def _bring_together(inside: set[Node]) -> None:
    """Moves what depends on calls of a region behind the last of them, everything else before the first."""
    span = _span(inside)
    late = readers_among(span, inside)
    for node in span:
        if node not in inside and node not in late:
            span[0].prepend(node)
    move_behind(span[-1], late)


def _span(inside: set[Node]) -> list[Node]:
    """The nodes from a region's first call to its last."""
    found: list[Node] = []
    left = len(inside)
    node = min(inside)
    while left:
        found.append(node)
        left -= node in inside
        node = node.next
    return found

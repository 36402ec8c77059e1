"""LiftReductions: sums over the ranks are completed where each position is a row of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Node

from tpcompile.ir.graph_edit import call_before, call_behind, replace
from tpcompile.ir.markers import all_reduce, keep_first
from tpcompile.ir.nodes import operands, shape
from tpcompile.ir.placements import P, R
from tpcompile.planner.global_program import GlobalProgram, Pass
from tpcompile.rules.choices import Choice, whole
from tpcompile.rules.rule import Rule

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}


@dataclass(frozen=True)
class LiftReductions(Pass):
    """Moves all-reduces without changing what they send.

    Behind a view that takes rows apart (``(b s) h -> b s h``), so that positions are a dimension of what is
    reduced. And before the addition of values that are whole already: ``all_reduce(keep_first(h) + x)``
    becomes ``h + all_reduce(x)``, and so does ``all_reduce(y + x)`` where ``h = all_reduce(y)`` exists.
    ``divide-sequence`` needs both.
    """

    name = "lift-reductions"

    def apply(self, program: GlobalProgram) -> bool:
        changed = False
        # The last first: what is lifted out of it may leave an earlier one alone with its value.
        for node in reversed(program.graph.find_nodes(op="call_function", target=all_reduce)):
            if node.args[2] == "sum":
                changed = _behind_view(node) or _before_additions(program, node) or changed
        return changed


def _behind_view(node: Node) -> bool:
    """``view(all_reduce(x))`` becomes ``all_reduce(view(x))`` where the view takes the rows of x apart."""
    view = next(iter(node.users))
    if len(node.users) > 1 or view.target not in _VIEWS:
        return False
    before, after = shape(node), shape(view)
    if len(after) <= len(before) or before[-1] != after[-1]:
        return False
    value = node.args[0]
    assert isinstance(value, Node)
    placement = node.meta["placement"]
    new = call_behind(view, all_reduce, view, *node.args[1:], placement=placement, like=node)
    view.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    view.replace_input_with(node, value)
    view.meta["placement"] = value.meta["placement"]
    view.meta["choices"] = tuple(Choice((p,), (p,)) for p in value.meta["placement"])
    node.graph.erase_node(node)
    return True


def _before_additions(program: GlobalProgram, node: Node) -> bool:
    """Takes whole values out of a sum that is to be reduced; the same additions, in another order."""
    axes, total = node.args[1], node.args[0]
    assert isinstance(total, Node)
    if len(total.users) > 1 or not _adds(program, total, total):
        return False
    additions, leaves = [total], []
    for leaf in _leaves(program, total, additions):
        leaves.append((leaf, _whole(leaf, axes)))
    ready = [w for _, w in leaves if w is not None]
    sums = [leaf for leaf, w in leaves if w is None]
    if not ready or not sums or any(shape(n) != shape(total) for n in (*ready, *sums)):
        return False
    additions.reverse()  # as they stand in the graph
    for addition in additions:
        node.prepend(addition)
    value = _chain(sums[0], sums[1:], additions[: len(sums) - 1], P)
    reduced = call_before(additions[len(sums) - 1], all_reduce, value, *node.args[1:], like=node)
    reduced.meta["placement"] = node.meta["placement"]
    # The value that was there first is the first summand again.
    result = _chain(reduced, ready, additions[len(sums) - 1 :], R)
    replace(node, result)
    for leaf, _ in leaves:
        if not leaf.users:  # a copy that only the first rank kept
            node.graph.erase_node(leaf)
    return True


def _chain(first: Node, others: list[Node], additions: list[Node], placement: object) -> Node:
    """Adds values one after the other in additions that are there."""
    for addition, other in zip(additions, others, strict=True):
        axes = len(addition.meta["placement"])
        addition.args = (other, first) if placement == R else (first, other)
        addition.meta["placement"] = (placement,) * axes
        each = Choice((P, P), (P,)) if placement == P else whole(2, 1)
        addition.meta["choices"] = (each,) * axes
        first = addition
    return first


def _leaves(program: GlobalProgram, total: Node, additions: list[Node]) -> Iterator[Node]:
    """What a tree of additions adds up, each read by the next alone; notes the additions, latest first."""
    operand: Node
    for operand in total.args:  # type: ignore[assignment]
        if len(operand.users) == 1 and _adds(program, operand, total):
            additions.append(operand)
            yield from _leaves(program, operand, additions)
        else:
            yield operand


def _adds(program: GlobalProgram, node: Node, like: Node) -> bool:
    """Whether a call is the plain sum of two values, all of one shape and type, and all of it summands."""
    if node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
        return False
    both = operands(node)
    alike = len(both) == 2 and all(
        shape(n) == shape(like) and n.meta["val"].dtype == like.meta["val"].dtype for n in (node, *both)
    )
    rules = program.decided.rules if program.decided else {}
    return alike and isinstance(rules.get(node), Rule) and all(p == P for p in node.meta["placement"])


def _whole(leaf: Node, axes: object) -> Node | None:
    """The value of which a summand is the first rank's, or which has been reduced already."""
    if leaf.target is keep_first and leaf.args[1] == axes:
        source = leaf.args[0]
        assert isinstance(source, Node)
        return source
    return next((u for u in leaf.users if u.target is all_reduce and u.args[1:] == (axes, "sum")), None)

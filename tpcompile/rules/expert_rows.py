"""Rows that belong to whoever holds what they choose: tokens and their experts.

``weights[ids]`` with whole experts divided over the ranks gives every rank all rows, of which only those are
right whose expert it holds. Calls that treat rows one by one may go on with such a value, whatever the
others contain; at the end it is masked, and is then an ordinary sum over the ranks. ``Owned`` is the
placement of such a value; this file finds the calls that can begin or carry it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from tpcompile.ir.nodes import operands, results

from .rule import Rule

aten = torch.ops.aten
GROUPED = ("aten._grouped_mm", "transformers.grouped_mm_fallback")
Tag = tuple[str, int]
"""The node that says which expert each row has chosen, and how many experts there are."""


@dataclass(frozen=True)
class Carrier:
    """One way in which a call computes rows that others than their owners have wrong.

    Attributes:
        tag: whose rows.
        inputs: per operand the dimension of its rows, or None where it is whole.
        outputs: per result the dimension of its rows.
        stack: the operand whose first dimension, the experts, is divided, if the rows begin here.
    """

    tag: Tag
    inputs: tuple[int | None, ...]
    outputs: tuple[int, ...]
    stack: int | None = None


def find_carriers(graph: Graph, rules: Mapping[Node, Rule | str]) -> dict[Node, tuple[Carrier, ...]]:
    """Per call, how it can begin or carry owned rows."""
    rows: dict[Node, dict[Tag, int]] = {}
    found: dict[Node, tuple[Carrier, ...]] = {}
    for node in graph.nodes:
        rule = rules.get(node)
        if node.target is operator.getitem:
            rows[node] = rows.get(node.args[0], {})
        if not isinstance(rule, Rule):
            continue
        carriers = [*_beginning(node), *_carrying(node, rule, rows)]
        unique = {(c.tag, c.stack is None): c for c in carriers}
        if unique:
            found[node] = tuple(unique.values())
            # All results have their rows in the same dimension, or the call would carry none.
            rows[node] = {c.tag: c.outputs[0] for c in unique.values()}
    return found


def _beginning(node: Node) -> Iterator[Carrier]:
    """A choice among experts by a vector of their numbers, or sorted rows times a stack of them."""
    name = str(node.target).rpartition(".")[0]
    if node.target is aten.index.Tensor:
        stack, *ids = operands(node)
        shape = stack.meta["val"].shape
        one = len(ids) == 1 and node.args[1][0] is ids[0] and ids[0].meta["val"].ndim == 1  # type: ignore[index]
        if one and len(shape) >= 2 and isinstance(shape[0], int) and ids[0].meta["val"].dtype != torch.bool:
            yield Carrier((ids[0].name, shape[0]), (None, None), (0,), stack=0)
    elif name in GROUPED and len(operands(node)) == 3:
        offsets = operands(node)[2]
        ids_node = _counted(offsets)
        experts = operands(node)[1].meta["val"].shape[0]
        if ids_node is not None and isinstance(experts, int):
            yield Carrier((ids_node.name, experts), (0, None, None), (0,), stack=1)


def _counted(offsets: Node) -> Node | None:
    """The sorted numbers of which offsets are the running count, if they are one."""
    value, wanted = offsets, [aten.cumsum.default, aten.histc.default]
    while wanted:
        if value.op != "call_function" or not operands(value):
            return None
        if value.target is wanted[0]:
            wanted.pop(0)
        elif value.target is not aten._to_copy.default:
            return None
        value = operands(value)[0]
    while value.op == "call_function" and value.target is aten._to_copy.default:
        value = operands(value)[0]
    return value


def _carrying(node: Node, rule: Rule, rows: Mapping[Node, Mapping[Tag, int]]) -> Iterator[Carrier]:
    """A call whose rows come from rows alone: each result has them, and nothing is done across them."""
    ops = operands(node)
    for i, operand in enumerate(ops):
        for tag, dim in rows.get(operand, {}).items():
            letters = rule.inputs[i][dim]
            if not letters or set(letters) & (rule.whole | rule.reduce.keys()):
                continue
            places = [_place(labels, letters) for labels in (*rule.inputs, *rule.outputs)]
            inputs, outputs = places[: len(ops)], places[len(ops) :]
            if any(p == -1 for p in places) or any(p is None for p in outputs) or not outputs:
                continue
            if len(set(outputs)) == 1 and len(results(node)) == len(outputs):
                yield Carrier(tag, tuple(inputs), tuple(p for p in outputs if p is not None))


def _place(labels: Any, letters: tuple[str, ...]) -> int | None:
    """The dimension that is just these letters; None if none has any of them, -1 if one has a few."""
    found = [d for d, names in enumerate(labels) if set(names) & set(letters)]
    if not found:
        return None
    return found[0] if len(found) == 1 and labels[found[0]] == letters else -1

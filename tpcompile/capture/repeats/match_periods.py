"""Says which nodes of a graph belong to which period of repeated layers, and compares two periods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from tpcompile.capture.export.specs import InputSpec
from tpcompile.errors import TpCompileError
from tpcompile.ir import random_numbers as _registers_the_operator  # noqa: F401

from .blocks import BLOCK, Block, Repeat, block_of

_UNIFORM = torch.ops.tpcompile.uniform.default


def tag_nodes(
    graph: Graph,
    inputs: Sequence[InputSpec],
    repeats: Sequence[Repeat],
    leaves: Mapping[str, Block] | None = None,
) -> set[Node]:
    """Write on every node which period it belongs to: by its name or its module, else by data flow.

    Args:
        graph: a captured graph.
        inputs: what its placeholders are.
        repeats: the lists of layers.
        leaves: inputs of the call that are a period's own, by name.

    Returns:
        The calls that were made inside of layers.
    """
    for node, spec in zip(graph.find_nodes(op="placeholder"), inputs, strict=True):
        if spec.kind in ("param", "buffer"):
            _tag(node, [spec.name], repeats)
        elif spec.kind == "user" and leaves and spec.name in leaves:
            node.meta[BLOCK] = leaves[spec.name]
    for node in graph.nodes:
        if node.op not in ("placeholder", "output"):
            stack = node.meta.get("nn_module_stack") or {}
            _tag(node, [entry[0] for entry in stack.values()], repeats)
    inside = {node for node in graph.nodes if BLOCK in node.meta and node.op != "placeholder"}
    tag_by_flow(graph, len(repeats))
    return inside


def _tag(node: Node, names: Sequence[str], repeats: Sequence[Repeat]) -> None:
    for number, repeat in enumerate(repeats):
        periods = [p for p in (repeat.period_of(name) for name in names) if p is not None]
        if periods:
            node.meta[BLOCK] = Block(number, periods[-1])
            return


def tag_tail(result: Any, block: Block) -> None:
    """Tag what only leads from a period to one of the graph's results.

    A cache is taken apart behind the last layer; what that needs of one layer belongs to it.
    """
    tagged: set[Node] = set()
    waiting = [result] if isinstance(result, Node) else []
    while waiting:
        node = waiting.pop()
        free = node.op == "call_function" and BLOCK not in node.meta
        if free and all(user in tagged or user.op == "output" for user in node.users):
            node.meta[BLOCK] = block
            tagged.add(node)
            waiting.extend(node.all_input_nodes)


def tag_by_flow(graph: Graph, repeats: int) -> None:
    """Tag calls that carry no tag, where the data flow says to which period they belong.

    A node between two periods belongs to the later one, as does one that only a single period uses: the
    model may compute on its way to every layer. What several periods use belongs to none.
    """
    for number in range(repeats):
        before = _highest_inputs(graph, number)
        for node, (period, alone) in _lowest_users(graph, number).items():
            if alone or before.get(node, period + 1) <= period:
                node.meta[BLOCK] = Block(number, period)


def _highest_inputs(graph: Graph, number: int) -> dict[Node, int]:
    """Return per node the latest period that it depends on."""
    found: dict[Node, int] = {}
    for node in graph.nodes:
        block = block_of(node)
        if block is not None and block.repeat == number:
            found[node] = block.period
        else:
            inputs = [found[operand] for operand in node.all_input_nodes if operand in found]
            if inputs:
                found[node] = max(inputs)
    return found


def _lowest_users(graph: Graph, number: int) -> dict[Node, tuple[int, bool]]:
    """Return per untagged call the first period that depends on it, and whether nothing else does."""
    found: dict[Node, tuple[int, bool]] = {}
    for node in reversed(graph.nodes):
        if node.op in ("placeholder", "output") or BLOCK in node.meta:
            continue
        users = []
        for user in node.users:
            block = block_of(user)
            inside = block is not None and block.repeat == number
            users.append((block.period, True) if block and inside else found.get(user, (-1, False)))
        periods = {period for period, _ in users if period >= 0}
        if periods:
            found[node] = (min(periods), all(only for _, only in users) and len(periods) == 1)
    return found


@dataclass
class Match:
    """Two periods, node by node.

    Attributes:
        pairs: the nodes of the earlier period (weights too) with those of the later one.
        carried: results of the earlier period that the later one takes, with what the earlier takes there.
        weights: the later period's placeholders, in the graph's order.
        calls: the later period's other nodes, in the graph's order.
    """

    pairs: dict[Node, Node] = field(default_factory=dict)
    carried: dict[Node, Node] = field(default_factory=dict)
    weights: list[Node] = field(default_factory=list)
    calls: list[Node] = field(default_factory=list)


def match_periods(graph: Graph, number: int, period: int) -> Match:
    """Match a period with the one before it.

    Args:
        graph: a tagged graph.
        number: which list of layers.
        period: the later of the two periods.

    Raises:
        TpCompileError: they compute different things, or the layers before hand results to something
            other than the next period, so that they cannot be repeated.
    """
    return _Matcher(graph, number, period).match()


class _Matcher:
    def __init__(self, graph: Graph, number: int, period: int) -> None:
        self.earlier, self.later = Block(number, period - 1), Block(number, period)
        self.members: dict[Block, list[Node]] = {}
        for node in graph.nodes:
            if (block := block_of(node)) is not None:
                self.members.setdefault(block, []).append(node)
        self.result = Match()
        self.taken: set[Node] = set()

    def match(self) -> Match:
        ours = {block: self.members.get(block, []) for block in (self.earlier, self.later)}
        weights = {b: [n for n in nodes if n.op == "placeholder"] for b, nodes in ours.items()}
        calls = {b: [n for n in nodes if n.op != "placeholder"] for b, nodes in ours.items()}
        if not calls[self.later]:
            raise self.error("it has no nodes", None)
        if len(weights[self.earlier]) != len(weights[self.later]):
            raise self.error("they have different numbers of weights", None)
        for one, two in zip(calls[self.earlier], calls[self.later], strict=False):
            self.compare(one, two)
        if len(calls[self.earlier]) != len(calls[self.later]):
            counts = f"{len(calls[self.earlier])} and {len(calls[self.later])}"
            raise self.error(f"they have {counts} nodes", None)
        for one, two in zip(weights[self.earlier], weights[self.later], strict=True):
            if one not in self.result.pairs and two not in self.taken and not one.users and not two.users:
                self.pair(one, two)
        self.refuse_leaks(ours)
        self.result.weights, self.result.calls = weights[self.later], calls[self.later]
        return self.result

    def compare(self, one: Node, two: Node) -> None:
        same = one.op == two.op and one.target == two.target
        if (
            not same
            or not self.equal(_own_args(one), _own_args(two))
            or not self.equal(one.kwargs, two.kwargs)
        ):
            raise self.error(f"{one} = {one.target}{one.args}, {two} = {two.target}{two.args}", two)
        if describe_value(one.meta.get("val")) != describe_value(two.meta.get("val")):
            raise self.error(f"{one} and {two} have different shapes or types", two)
        self.pair(one, two)

    def pair(self, one: Node, two: Node) -> None:
        self.result.pairs[one] = two
        self.taken.add(two)

    def equal(self, one: Any, two: Any) -> bool:
        if isinstance(one, Node) and isinstance(two, Node):
            return self.same_operand(one, two)
        if type(one) is not type(two):
            return False
        if isinstance(one, (list, tuple)):
            return len(one) == len(two) and all(map(self.equal, one, two))
        if isinstance(one, dict):
            return one.keys() == two.keys() and all(self.equal(one[key], two[key]) for key in one)
        if isinstance(one, slice):
            return self.equal((one.start, one.stop, one.step), (two.start, two.stop, two.step))
        return one is two or one == two or repr(one) == repr(two)  # nan != nan

    def same_operand(self, one: Node, two: Node) -> bool:
        """Whether two operands correspond: own results or weights, results handed on, or one shared value."""
        one_block, two_block = block_of(one), block_of(two)
        if one_block == self.earlier:
            if one.op != "placeholder":
                return self.result.pairs.get(one) is two
            if one in self.result.pairs or two in self.taken:
                return self.result.pairs.get(one) is two
            fits = two_block == self.later and two.op == "placeholder"
            if fits and describe_value(one.meta["val"]) == describe_value(two.meta["val"]):
                self.pair(one, two)
                return True
            return False
        if two_block == self.earlier:
            # What the first layer takes was made before all periods, where the model adds up between layers.
            before = (None, Block(self.earlier.repeat, self.earlier.period - 1))
            handed = one_block in before[self.earlier.period > 1 :] and two.op != "placeholder"
            return handed and self.result.carried.setdefault(two, one) is one
        return one is two and one_block != self.later

    def refuse_leaks(self, ours: dict[Block, list[Node]]) -> None:
        """What goes elsewhere than to its period and the next, results of the program apart."""
        for block, nodes in ours.items():
            for node in nodes:
                allowed = (block,) if node.op == "placeholder" else (self.earlier, self.later)
                checked = node.op == "placeholder" or block == self.earlier
                for user in node.users if checked else ():
                    if block_of(user) not in allowed and user.op != "output":
                        raise self.error(f"{node} is also used by {user}", node)

    def error(self, what: str, node: Node | None) -> TpCompileError:
        stack = list((node.meta.get("nn_module_stack") or {}).values()) if node is not None else []
        return TpCompileError(
            f"periods {self.earlier.period} and {self.later.period} of repeated layers differ: {what}",
            todo="report this program: it is a mistake of tpcompile",
            where=str(stack[-1][0]) if stack else str(node or ""),
        )


def _own_args(node: Node) -> tuple[Any, ...]:
    """Arguments but for the number of a random stream: every layer has its own, which is given at the end."""
    return (*node.args[:2], *node.args[3:]) if node.target is _UNIFORM else node.args


def describe_value(value: Any) -> str:
    """Return shape, type and device of what a node computes; symbols by name."""
    if isinstance(value, torch.Tensor):
        return f"{[str(size) for size in value.shape]} {value.dtype} {value.device} {value.requires_grad}"
    if isinstance(value, (list, tuple)):
        return str([describe_value(item) for item in value])
    return f"{type(value).__name__} {value}"

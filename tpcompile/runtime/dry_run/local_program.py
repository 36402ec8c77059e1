"""A rank's graph, run on tensors without values part by part."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from tpcompile.capture.repeats.blocks import Block, block_of
from tpcompile.ir.torch_internals import current_autograd_node, get_sequence_nr

from .recorder import Label

_ACCUMULATES = 2**63
"""Sequence numbers from here on are those of the nodes that add gradients up: they belong to no call."""


@dataclass
class LayerStretch:
    """Calls that stand together in a graph: a period of repeated layers, or what is between two.

    Attributes:
        block: the period, or None.
        calls: the nodes.
    """

    block: Block | None
    calls: list[Node] = field(default_factory=list)


def stretches(graph: Graph) -> list[LayerStretch]:
    """The calls of a graph, period by period.

    A call of no period that stands between two of the same one is counted with it.
    """
    calls = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    following: list[Block | None] = [None]
    for node in reversed(calls):
        following.append(block_of(node) or following[-1])
    found: list[LayerStretch] = []
    for node, after in zip(calls, reversed(following[1:]), strict=True):
        block = block_of(node)
        if block is None and found and after == found[-1].block:
            block = after
        if not found or block != found[-1].block:
            found.append(LayerStretch(block))
        found[-1].calls.append(node)
    return found


class LocalProgram:
    """Runs a rank's graph.

    Args:
        module: the graph.

    Attributes:
        label: the part that runs now, in a forward.
    """

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.parts = stretches(module.graph)
        self.label: Label = ("forward", "before")
        self._begun: list[int] = []
        self._labels: list[Label] = []
        self._last: Label = ("forward", "before")
        self._dead = _last_uses([node for part in self.parts for node in part.calls], module.graph)

    def where(self) -> Label:
        """The part that runs now: in backward that of the call whose gradient is computed."""
        node = current_autograd_node()
        if node is None:
            self._last = self.label
            return self.label
        number = node._sequence_nr()
        if number < _ACCUMULATES:
            at = bisect_right(self._begun, number) - 1
            part = self._labels[at] if at >= 0 else ("forward", "before")
            self._last = ("backward", part[1])
        return self._last

    def run(self, inputs: list[Any]) -> tuple[Any, ...]:
        """Runs all calls; ``inputs`` is emptied: what nobody else holds is freed after its last use."""
        graph = self.module.graph
        env: dict[Node, Any] = dict(zip(graph.find_nodes(op="placeholder"), inputs, strict=True))
        inputs.clear()
        place: object = "before"
        for part in self.parts:
            if part.block is not None:
                place = f"behind list {part.block.repeat}"
            self._begin(("forward", part.block if part.block is not None else place))
            self._evaluate(env, part.calls)
        self._begin(("forward", "behind"))
        results = graph.output_node().args[0]
        return tuple(env[x] if isinstance(x, Node) else x for x in results)  # type: ignore[union-attr]

    def _begin(self, label: Label) -> None:
        self.label = label
        self._begun.append(get_sequence_nr())
        self._labels.append(label)

    def _evaluate(self, env: dict[Node, Any], calls: Sequence[Node]) -> None:
        for node in calls:
            args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
            call: Any = node.target
            env[node] = call(*args, **kwargs)
            del call, args, kwargs
            for dead in self._dead.get(node, ()):
                env.pop(dead, None)


def _last_uses(calls: Sequence[Node], graph: Graph) -> dict[Node, list[Node]]:
    """Per call the values that nobody reads any more behind it."""
    found: dict[Node, list[Node]] = {}
    seen: set[Node] = set()
    for node in reversed([*calls, graph.output_node()]):
        for value in (*node.all_input_nodes, node):
            if value not in seen:
                seen.add(value)
                found.setdefault(node, []).append(value)
    return found

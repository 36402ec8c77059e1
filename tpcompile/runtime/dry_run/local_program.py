"""A rank's graph, run on tensors without values part by part; layers may be recomputed in backward."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils.checkpoint import checkpoint

from tpcompile.capture.repeats.blocks import Block, block_of
from tpcompile.errors import TpCompileError
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
        given: what they read from others,
        handed: and what others read from them.
    """

    block: Block | None
    calls: list[Node] = field(default_factory=list)
    given: list[Node] = field(default_factory=list)
    handed: list[Node] = field(default_factory=list)


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


def gathered(parts: Sequence[LayerStretch]) -> list[LayerStretch]:
    """The same calls with those of a period in one stretch: what comes early and only it reads is delayed.

    Raises:
        TpCompileError: periods cannot be told apart like this.
    """
    longest: dict[Block, LayerStretch] = {}
    for one in parts:
        if one.block is not None and len(one.calls) > len(longest.get(one.block, LayerStretch(None)).calls):
            longest[one.block] = one
    found: list[LayerStretch] = []
    early: dict[Block, list[Node]] = {}
    apart = not longest
    for one in parts:
        if one.block is None:
            found.append(one)
        elif one is not longest[one.block]:
            early.setdefault(one.block, []).extend(one.calls)
        else:
            delayed = early.pop(one.block, [])
            found.append(LayerStretch(one.block, [*delayed, *one.calls]))
            mine = set(found[-1].calls)
            apart = apart or any(user not in mine for node in delayed for user in node.users)
    if early or apart:
        raise TpCompileError(
            "the program has no list of repeated layers, one behind the other, to compute again",
            where="checkpointing",
            todo="estimate without checkpointing",
        )
    for one in found:
        mine = set(one.calls)
        one.given = list(dict.fromkeys(i for n in one.calls for i in n.all_input_nodes if i not in mine))
        one.handed = [n for n in one.calls if any(user not in mine for user in n.users)]
    return found


class LocalProgram:
    """Runs a rank's graph.

    Args:
        module: the graph.
        recompute: run every period of repeated layers again in backward, instead of keeping what it computes.

    Attributes:
        label: the part that runs now, in a forward.
    """

    def __init__(self, module: GraphModule, recompute: bool = False) -> None:
        self.module, self.recompute = module, recompute
        parts = stretches(module.graph)
        self.parts = gathered(parts) if recompute else parts
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
            if self.recompute and part.block is not None:
                results = checkpoint(
                    lambda *given, part=part: self._part(part, given),
                    *(env[n] for n in part.given),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                env.update(zip(part.handed, results, strict=True))
                self._drop(env, part.calls)
            else:
                self._evaluate(env, part.calls)
        self._begin(("forward", "behind"))
        results = graph.output_node().args[0]
        return tuple(env[x] if isinstance(x, Node) else x for x in results)  # type: ignore[union-attr]

    def _begin(self, label: Label) -> None:
        self.label = label
        self._begun.append(get_sequence_nr())
        self._labels.append(label)

    def _part(self, part: LayerStretch, given: Sequence[Any]) -> tuple[Any, ...]:
        env = dict(zip(part.given, given, strict=True))
        self._evaluate(env, part.calls, keep=set(part.handed))
        return tuple(env[n] for n in part.handed)

    def _evaluate(self, env: dict[Node, Any], calls: Sequence[Node], keep: Any = ()) -> None:
        for node in calls:
            args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)
            call: Any = node.target  # a region that the model itself recomputes is a submodule
            call = self.module.get_submodule(call) if node.op == "call_module" else call
            env[node] = call(*args, **kwargs)
            del call, args, kwargs
            self._drop(env, [node], keep)

    def _drop(self, env: dict[Node, Any], calls: Sequence[Node], keep: Any = ()) -> None:
        for node in calls:
            for dead in self._dead.get(node, ()):
                if dead not in keep:
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

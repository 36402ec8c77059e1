"""Runs the programs of all ranks in one process, node by node in lockstep, collectives by hand.

No process group and no threads: what a rank would receive is computed from the other ranks' values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tpcompile.errors import TpCompileError
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.markers import Axes
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.ranks.compare_sent import Sent

from .collective_lines import sent_by
from .joint import COLLECTIVES, joint
from .known_values import KnownValues
from .lower_graph import lower_program

Watch = Callable[[int, Node, Any], None]
"""Told of every value: the rank, the node of its graph, and what it computes there."""


@dataclass
class SimulatedGroups:
    """Groups of one simulated rank; a group's name lists its axes."""

    axis_sizes: tuple[int, ...]
    coordinates: tuple[int, ...]

    def name(self, axes: Axes) -> str:
        return ",".join(map(str, axes))

    def index(self, axes: Axes) -> int:
        at = 0
        for a in axes:
            at = at * self.axis_sizes[a] + self.coordinates[a]
        return at


def coordinates(axis_sizes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All ranks' coordinates, in rank order."""
    return list(map(WeightLayout(axis_sizes, {}).coordinates, range(math.prod(axis_sizes))))


def lower_all(program: GlobalProgram) -> list[GraphModule]:
    """The programs of all ranks."""
    known = KnownValues()
    return [
        lower_program(program, at, SimulatedGroups(program.axis_sizes, at), known).local
        for at in coordinates(program.axis_sizes)
    ]


def sent(axis_sizes: tuple[int, ...], lowered: Sequence[GraphModule]) -> list[list[Sent]]:
    """What the programs of all ranks send, for comparison."""
    everyone = coordinates(axis_sizes)
    return [
        sent_by(local.graph, lambda group, r=r: tuple(_members(group, everyone, r)))  # type: ignore[misc]
        for r, local in enumerate(lowered)
    ]


def run(
    program: GlobalProgram,
    inputs: Sequence[Sequence[Any]],
    lowered: Sequence[GraphModule] | None = None,
    watch: Watch | None = None,
) -> list[tuple[Any, ...]]:
    """Runs all ranks on their own inputs (placeholders in order); returns their results.

    Raises:
        TpCompileError: the ranks don't send the same.
    """
    everyone = coordinates(program.axis_sizes)
    ranks = [
        _Rank(r, local, iter(given), watch)
        for r, (local, given) in enumerate(zip(lowered or lower_all(program), inputs, strict=True))
    ]
    while waiting := {r: node for r, rank in enumerate(ranks) if (node := rank.advance()) is not None}:
        _refuse_unlike(waiting, len(ranks))
        for r, node in waiting.items():
            members = _members(str(node.args[1]), everyone, r)
            if members[0] == r:  # once per group
                loaded = [ranks[m].load(waiting[m])[0] for m in members]
                for m, result in zip(members, joint(node.target, loaded), strict=True):
                    ranks[m].put(waiting[m], result)
    return [rank.load(rank.nodes[-1])[0][0] for rank in ranks]


class _Rank:
    """One rank on its way through its graph."""

    def __init__(self, rank: int, local: GraphModule, feed: Any, watch: Watch | None) -> None:
        self.rank, self.nodes, self.feed, self.watch = rank, list(local.graph.nodes), feed, watch
        self.values: dict[Node, Any] = {}
        self.at = 0

    def advance(self) -> Node | None:
        """Runs up to the next collective, which is returned; None at the end."""
        while (node := self.nodes[self.at]).op != "output":
            if node.target in COLLECTIVES:
                return node
            if node.op == "placeholder":
                self.put(node, next(self.feed))
            else:
                args, kwargs = self.load(node)
                self.put(node, node.target(*args, **kwargs))
        return None

    def load(self, node: Node) -> Any:
        """The values of a call's arguments."""
        return torch.fx.node.map_arg((node.args, node.kwargs), self.values.__getitem__)

    def put(self, node: Node, value: Any) -> None:
        """Takes a value down, and goes on behind it."""
        if self.watch is not None:
            self.watch(self.rank, node, value)
        self.values[node] = value
        self.at += 1


def _refuse_unlike(waiting: dict[int, Node], ranks: int) -> None:
    targets = {str(node.target) for node in waiting.values()}
    if len(waiting) == ranks and len(targets) == 1:
        return
    missing = sorted(set(range(ranks)) - waiting.keys())
    what = f"ranks {missing} never reach a collective" if missing else "ranks make different collectives"
    raise TpCompileError(
        f"{what}: {', '.join(sorted(targets))}",
        where=next(iter(waiting.values())).name,
        todo="report this program: its ranks would wait for each other",
    )


def _members(group: str, everyone: list[tuple[int, ...]], rank: int) -> list[int]:
    axes = [int(a) for a in group.split(",")]
    mine = everyone[rank]
    return [
        r for r, at in enumerate(everyone) if all(at[a] == mine[a] for a in range(len(mine)) if a not in axes)
    ]

"""CoalesceCollectives: all-reduces that are ready together travel together."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch.fx import Graph, Node

from tpcompile.ir.graph_edit import between, call, move_behind, readers_among
from tpcompile.ir.markers import Axes, all_reduce, all_reduce_coalesced, keep_first
from tpcompile.ir.nodes import tensor_of
from tpcompile.ir.placements import P, Replicate
from tpcompile.ir.regions import region_of
from tpcompile.ir.sizes import bytes_of
from tpcompile.planner.global_program import GlobalProgram, Pass
from tpcompile.planner.search.cost import PRESETS, CostModel


@dataclass
class _Run:
    """All-reduces of one kind that can travel together.

    Attributes:
        nodes: the all-reduces.
        axes: the sub-axes on which the one in their place reduces.
        needing: its members, and what is computed from them.
    """

    nodes: list[Node] = field(default_factory=list)
    axes: Axes = ()
    needing: set[Node] = field(default_factory=set)

    def add(self, node: Node, axes: Axes) -> None:
        self.nodes.append(node)
        self.needing.add(node)
        self.axes = axes


@dataclass(frozen=True)
class CoalesceCollectives(Pass):
    """Replaces all-reduces of the same kind, none of which needs another's result, by one.

    Fires for small values (at most ``largest`` bytes for the example's sizes), where latency is what
    counts: the statistics of a query and a key norm, say. They must be of one type.

    Sums on other sub-axes join where the cost model says that it pays: a value that is whole on a sub-axis
    is a sum there once all ranks but the first have zeros (``keep_first``). Neither that nor an all-reduce
    changes a gradient on its way back, so gradients are what they were.
    """

    name = "coalesce-collectives"
    cost: CostModel = PRESETS["cpu"]
    largest: int = 1 << 20

    def apply(self, program: GlobalProgram) -> bool:
        runs = [run for run in self._runs(program) if len(run.nodes) > 1]
        for run in runs:
            _join(program.graph, run)
        return bool(runs)

    def _runs(self, program: GlobalProgram) -> Iterator[_Run]:
        """Small all-reduces of one kind that do not need each other's results.

        Runs are found in the graph's order and do not interleave. So joining one, which makes its results
        depend on all its operands, cannot make a member of another depend on a second one.
        """
        run = _Run()
        for node in program.graph.nodes:
            needs = any(i in run.needing for i in node.all_input_nodes)
            if (
                node.target is all_reduce
                and node.args[2] == "sum"
                and bytes_of(tensor_of(node)) <= self.largest
            ):
                axes = None if needs else self._joint_axes(program, run, node)
                if axes is None:
                    yield run
                    run, axes = _Run(), _axes(node)
                run.add(node, axes)
            elif needs:
                run.needing.add(node)
        yield run

    def _joint_axes(self, program: GlobalProgram, run: _Run, node: Node) -> Axes | None:
        """The sub-axes on which a run and one more reduce together; None if they cannot, or should not."""
        mine = _axes(node)
        if not run.nodes:
            return mine
        first = run.nodes[0]
        if first.meta["val"].dtype != node.meta["val"].dtype or region_of(first) != region_of(node):
            return None  # regions that exchange values could not be computed again one by one
        axes = tuple(sorted({*run.axes, *mine}))
        if run.axes == mine:
            return axes
        nodes = [*run.nodes, node]
        if not all(_whole_on_the_others(n, axes) for n in nodes):
            return None
        apart = self._time(program, run.nodes, run.axes) + self._time(program, [node], mine)
        return axes if self._time(program, nodes, axes) < apart else None

    def _time(self, program: GlobalProgram, nodes: Sequence[Node], axes: Axes) -> float:
        """The modelled time of reducing several values on some sub-axes at once."""
        ranks = math.prod(program.axis_sizes[a] for a in axes)
        widened = [n for n in nodes if _axes(n) != axes]
        kept = sum(self.cost.launch + self.cost.touch(bytes_of(tensor_of(n))) for n in widened)
        near = self.cost.near(axes, program.axis_sizes)
        return kept + self.cost.all_reduce(sum(bytes_of(tensor_of(n)) for n in nodes), ranks, near)


def _axes(node: Node) -> Axes:
    axes: Axes = node.args[1]  # type: ignore[assignment]
    return axes


def _whole_on_the_others(node: Node, axes: Axes) -> bool:
    """Whether a value is whole on those of the sub-axes on which it is not reduced."""
    return all(isinstance(node.meta["placement"][a], Replicate) for a in axes if a not in _axes(node))


def _join(graph: Graph, run: _Run) -> None:
    """Puts one collective where the last of several is, and behind it what waits for any of them."""
    nodes = run.nodes
    first, last = nodes[0], nodes[-1]
    with graph.inserting_before(last):
        operands = [_widened(graph, node, run.axes) for node in nodes]
        joined = call(graph, all_reduce_coalesced, (operands, run.axes, first.args[2]), like=last)
        parts = [call(graph, operator.getitem, (joined, i), like=n) for i, n in enumerate(nodes)]
    for node, part in zip(nodes, parts, strict=True):
        part.meta["placement"] = node.meta["placement"]
        node.replace_all_uses_with(part)
    move_behind(parts[-1], readers_among(between(first, last), parts))
    for node in nodes:
        graph.erase_node(node)


def _widened(graph: Graph, node: Node, axes: Axes) -> Node:
    """What an all-reduce reduces, as a sum on all of these sub-axes."""
    value = node.args[0]
    assert isinstance(value, Node)
    others = tuple(a for a in axes if a not in _axes(node))
    if not others:
        return value
    kept = call(graph, keep_first, (value, others), like=node)
    kept.meta["placement"] = tuple(P if a in axes else p for a, p in enumerate(node.meta["placement"]))
    return kept

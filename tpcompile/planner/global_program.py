"""What passes work on (the graph, where its inputs come from, what was decided), and what a pass is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch.fx import Graph, Node

from tpcompile.capture.export.captured import Captured
from tpcompile.capture.export.specs import InputSpec
from tpcompile.capture.held_caches import Held
from tpcompile.capture.repeats.blocks import RepeatedBlocks, block_of
from tpcompile.ir.graph_edit import copied
from tpcompile.ir.layout.segment import Segment, whole_segment
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.names import starred
from tpcompile.ir.nodes import ancestors, is_number, is_tensor, module_path, tensor_of
from tpcompile.ir.placements import Partial, Placement, R
from tpcompile.ir.proof import Proof
from tpcompile.rules.assignment import Assignment
from tpcompile.rules.factors import Factors, Known
from tpcompile.rules.table import rule_of
from tpcompile.strategies.custom.custom_modules import CustomModules


@dataclass(frozen=True)
class Source:
    """Where a placeholder's value comes from.

    Attributes:
        spec: the captured input.
        segment: for a parameter, or a buffer that is divided like one, which part of it (placements are
            filled in by the layout).
        order: segments of one parameter are held in this order; -1 for a parameter in one piece.
        count: how many segments, from ``order`` on, the placeholder stands for (more than one only in a
            lowered graph, where they are one tensor).
    """

    spec: InputSpec
    segment: Segment | None = None
    order: int = -1
    count: int = 1


Alike = tuple[str, str]
"""Calls of one operator in one module, repeated blocks counted together."""


def alike(node: Node) -> Alike:
    """Which calls would go the same way as this one."""
    return str(node.target), starred(module_path(node))


@dataclass
class GlobalProgram:
    """A program on its way through the compiler.

    Attributes:
        captured: what capture gave; its graph is the one that passes rewrite.
        ranks: the size of the mesh axis.
        sources: per placeholder, where its value comes from.
        decisions: per sub-axis, what the planner decided (empty before planning).
        decided: the factors that the decisions are about; None before planning.
        packed_dims: per parameter that was split into segments, the dimension in which they differ.
        split_groups: the packed matmuls that were split.
        layout: where the weights already are, if another program decided that.
        caches: how tensors are placed that callers carry from an earlier program to this one, by name.
        custom: the modules that the plan gives to custom strategies.
        refused: calls that are not to be divided, because lowering could not, with the reason.
        proof: what was proved of the program as it is now, once it is rewritten.
    """

    captured: Captured
    ranks: int
    sources: dict[Node, Source] = field(default_factory=dict)
    decisions: list[Assignment] = field(default_factory=list)
    decided: Factors | None = None
    packed_dims: dict[str, int] = field(default_factory=dict)
    split_groups: frozenset[str] = frozenset()
    layout: WeightLayout | None = None
    caches: Mapping[str, Held] = field(default_factory=dict)
    custom: CustomModules = field(default_factory=CustomModules)
    refused: Mapping[Alike, str] = field(default_factory=dict)
    proof: Proof | None = None
    steps: int = 0

    def __post_init__(self) -> None:
        if not self.sources:
            for node, spec in zip(self.graph.find_nodes(op="placeholder"), self.captured.inputs, strict=True):
                segment = None
                if spec.kind == "param":
                    segment = whole_segment([int(s) for s in node.meta["val"].shape], 0)
                self.sources[node] = Source(spec, segment)

    @property
    def graph(self) -> Graph:
        """The graph."""
        return self.captured.graph_module.graph

    @property
    def axis_sizes(self) -> tuple[int, ...]:
        """The sizes of the sub-axes that were planned."""
        return tuple(d.ranks for d in self.decisions)

    @property
    def blocks(self) -> RepeatedBlocks | None:
        """Which captured layers stand for others, if layers were left out."""
        return self.captured.blocks

    def times(self, node: Node) -> int:
        """How many nodes of the whole program a node stands for."""
        block = block_of(node)
        if self.blocks is None or block is None:
            return 1
        repeat = self.blocks.repeats[block.repeat]
        return 1 + repeat.copies if block.period == repeat.kept - 1 else 1

    def params(self) -> dict[Node, str]:
        """Placeholders of parameters (segments), and of weights in buffers, with their original name."""
        return {n: s.spec.name for n, s in self.sources.items() if s.segment is not None}

    def factors(self) -> Factors:
        """Rules and factors of the graph as it is now."""
        known: dict[Node, Known] = {}
        axis_sizes = self.layout.axis_sizes if self.layout is not None else ()
        for node, cache in self._given_as().items():
            known[node] = Known(cache.atoms, tuple(zip(cache.places, axis_sizes, strict=False)))
        for node, source in self.sources.items():
            decided = self.layout is not None and source.spec.name not in self.layout.undecided
            if decided and source.segment is not None:
                held = self.held_as(source)
                known[node] = Known(
                    held.atoms, [(held.place(a), ranks) for a, ranks in enumerate(axis_sizes)]
                )
        return Factors(self.graph, known, lambda node: self.refused.get(alike(node)) or rule_of(node))

    @property
    def planned_factors(self) -> Factors:
        """The factors that the decisions are about."""
        assert self.decided is not None, "the program must be planned"
        return self.decided

    def held_as(self, source: Source) -> Segment:
        """The segment of the given layout that a parameter placeholder is."""
        assert self.layout is not None
        return self.layout.params[source.spec.name].segments[max(source.order, 0)]

    def carried(self, factors: Factors) -> dict[Node, tuple[Placement, ...] | None]:
        """Results that stay divided, with their placements if an earlier program handed them out already."""
        found: dict[Node, tuple[Placement, ...] | None] = {}
        for out, spec in zip(self.outputs(), self.captured.outputs, strict=True):
            if isinstance(out, Node) and spec.divided:
                held = self.caches.get(spec.name)
                found[out] = held.placements(factors, out) if held else None
        return found

    def handed_out(self) -> dict[Node, tuple[Placement, ...]]:
        """The placements of the results that stay divided, once planned: a sum is completed before."""

        def planned(out: Node) -> tuple[Placement, ...]:
            each = (decision.output(out) for decision in self.decisions)
            return tuple(R if isinstance(p, Partial) else p for p in each)

        return {out: known or planned(out) for out, known in self.carried(self.planned_factors).items()}

    def given(self, factors: Factors) -> dict[Node, tuple[Placement, ...]]:
        """Inputs that come divided: what an earlier program handed out."""
        return {n: held.placements(factors, n) for n, held in self._given_as().items()}

    def _given_as(self) -> dict[Node, Held]:
        return {
            n: self.caches[s.spec.name]
            for n, s in self.sources.items()
            if s.spec.kind == "user" and s.spec.name in self.caches
        }

    def beside_losses(self) -> set[Node]:
        """Results that a loss, a single number among the results, is computed from, such as its logits.

        Who trains takes the loss and seldom looks at them: they are gathered when they are used.
        """
        return self.above_losses().intersection(self._plain_results())

    def above_losses(self) -> set[Node]:
        """All that the results which are single numbers are computed from."""
        return ancestors(out for out in self._plain_results() if is_number(tensor_of(out)))

    def _plain_results(self) -> list[Node]:
        """Tensors that the user gets, but for caches."""
        pairs = zip(self.outputs(), self.captured.outputs, strict=True)
        users = (out for out, spec in pairs if spec.kind == "user" and not spec.divided)
        return [out for out in users if isinstance(out, Node) and is_tensor(out)]

    def outputs(self) -> tuple[object, ...]:
        """The graph's flat results."""
        return tuple(self.graph.output_node().args[0])  # type: ignore[arg-type]

    def whole_outputs(self) -> list[object]:
        """The flat results of the whole program; of layers left out, what stands for it."""
        short = self.outputs()
        return list(short) if self.blocks is None else [short[d.output] for d in self.blocks.results]

    def copy(self) -> GlobalProgram:
        """The same program on a graph of its own; fake tensors are shared."""
        graph, moved = copied(self.graph)
        module = torch.fx.GraphModule(torch.nn.Module(), graph)
        return replace(
            self,
            captured=replace(self.captured, graph_module=module),
            sources={moved[n]: s for n, s in self.sources.items()},
            decisions=[],
            decided=None,
            packed_dims=dict(self.packed_dims),
        )

    def call_count(self) -> int:
        """How many calls the graph has."""
        return sum(n.op == "call_function" for n in self.graph.nodes)

    def serial(self) -> int:
        """Numbers the dumps."""
        self.steps += 1
        return self.steps

    def text(self) -> str:
        """The graph, a line per node: name, operator, operands, shape."""
        from tpcompile.ir.print_graph import graph_text

        return graph_text(self.graph)


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of the captured graph at global shapes. Options are the fields of the dataclass.

    The file, the class and ``name`` are the same words: ``split_packed_matmul.py``,
    ``SplitPackedMatmul``, ``split-packed-matmul``.

    Attributes:
        name: how the pass is called in errors and logs.
        before_planning: for a pass of the user's: it runs before the planner, which then plans what it makes,
            and not behind it, where it may change placements only.
    """

    name: ClassVar[str]
    before_planning: ClassVar[bool] = False

    @abstractmethod
    def apply(self, program: GlobalProgram) -> bool:
        """Rewrites the graph in place; says whether anything changed."""

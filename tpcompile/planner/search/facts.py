"""The least-cost placements of a graph on one axis of the mesh, given what is decided on others."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.fx import Graph, Node

from tpcompile.ir.nodes import operands, results
from tpcompile.ir.placements import Placement
from tpcompile.rules.assignment import Assignment
from tpcompile.rules.factors import Factors

from .axis_problem import AxisProblem
from .cost import CostModel
from .must_divide import SMALL, held_elsewhere, matrix, shares, weight_root, worth_dividing
from .quantities import Quantities
from .tie_layers import Ties

SHAPE_ONLY = (torch.ops.aten.sym_size.int,)
"""What needs no more of a value than its shape, in whatever placement."""


class Search:
    """Builds and solves the problem of one axis, given what is decided on others.

    Args:
        graph: the captured graph at global shapes.
        factors: its rules and factors.
        params: parameter placeholders with their names, as the layout knows them.
        carried: results that stay divided (caches): the placement wanted per axis, or None for any.
        given: inputs that come divided (caches), with their placement per axis.
        cost: the cost model.
        divide_small: small matrices must be divided too, whatever it costs.
        times: how many nodes of the whole model a node stands for, where layers were left out of the graph.
        ties: what is decided alike in repeated layers.
    """

    def __init__(
        self,
        graph: Graph,
        factors: Factors,
        params: Mapping[Node, str],
        cost: CostModel,
        carried: Mapping[Node, Sequence[Placement] | None] | None = None,
        given: Mapping[Node, Sequence[Placement]] | None = None,
        divide_small: bool = False,
        times: Callable[[Node], int] = lambda _: 1,
        ties: Ties | None = None,
    ) -> None:
        self.times, self.ties = times, ties or Ties()
        self.graph, self.factors, self.params, self.cost_model = graph, factors, params, cost
        self.carried, self.given = carried or {}, given or {}
        self.candidates = worth_dividing(factors, set(params))
        self.quantities = Quantities(graph, factors)
        self.live = _descendants(graph, {*params, *self.given})
        self.bytes = {v: self.quantities.bytes(v) for v in (*params, *self.given, *self.live) if results(v)}
        self.uses = self._uses()
        own = held_elsewhere(factors)
        matrices = {v: self.bytes[v] for v in params if matrix(v) and v in self.uses and v not in own}
        share = shares(matrices, params)
        limit = 0.0 if divide_small else SMALL
        self.large = {v for v in matrices if share[v] >= limit}
        self.little = {v for v in matrices if share[v] < limit}
        roots = set(params)
        self.weights = {v for v in self.bytes if weight_root(v, roots) is not None}

    def plan(
        self,
        axes: Sequence[int],
        axis: int,
        others: Mapping[int, Assignment],
        pins: Mapping[Node, frozenset[Placement]] | None = None,
    ) -> Assignment:
        """Solves one axis, given the decisions on some of the others.

        Args:
            axes: the sizes of all axes.
            axis: which of them to decide on.
            others: what is decided on others already.
            pins: the placements that parameters may have on this axis.

        Returns:
            The decisions; penalty, price and cost are those of all decided axes together.

        Raises:
            TpCompileError: the pins cannot be met.
        """
        return AxisProblem(self, axes, axis, others, pins or {}).solve()

    def _uses(self) -> dict[Node, list[tuple[Node, int]]]:
        found: dict[Node, list[tuple[Node, int]]] = {}
        for node in self.graph.nodes:
            if node.op == "output":
                for out in node.args[0]:
                    if (
                        isinstance(out, Node)
                        and self.carried.get(out, ()) is not None
                        and isinstance(out.meta["val"], torch.Tensor)
                    ):
                        found.setdefault(out, []).append((node, 0))
            elif node in self.live and node.target is not operator.getitem and node.target not in SHAPE_ONLY:
                for i, operand in enumerate(operands(node)):
                    found.setdefault(operand, []).append((node, i))
        return found


def _descendants(graph: Graph, params: set[Node]) -> dict[Node, None]:
    """Call nodes below a parameter, in graph order; all else (masks, rotary tables) is replicated."""
    found: dict[Node, None] = {}
    for node in graph.nodes:
        if node.op == "call_function" and any(i in params or i in found for i in node.all_input_nodes):
            found[node] = None
    return found

"""What the search knows of a program, whatever is decided on which axis."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from tpcompile.ir.nodes import operands, results
from tpcompile.ir.placements import Placement, R
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.rules.factors import Factors

from .cost import CostModel
from .must_divide import SMALL, held_elsewhere, matrix, shares, weight_root, worth_dividing
from .quantities import Quantities
from .tie_layers import tie_layers

SHAPE_ONLY = (torch.ops.aten.sym_size.int,)
"""What needs no more of a value than its shape, in whatever placement."""


class Facts:
    """What is known of a program's values and weights before anything is decided.

    Args:
        program: the program.
        factors: its rules and factors.
        cost: the cost model.
        divide_small: small matrices must be divided too, whatever it costs.

    Attributes:
        params: parameter placeholders with their names, as the layout knows them.
        carried: results that stay divided (caches): the placement wanted per axis, or None for any.
        given: inputs that come divided (caches), with their placement per axis.
        ties: what is decided alike in repeated layers.
        candidates: the atoms that may be divided.
        live: the calls below a parameter, in graph order.
        bytes: per value its size.
        uses: per value the operands that it is.
        large: matrices that must be divided, and
        little: those that may stay whole for a price.
        weights: values that are rearranged parameters.
        later: it is decided already where the weights are.
    """

    def __init__(
        self, program: GlobalProgram, factors: Factors, cost: CostModel, divide_small: bool = False
    ) -> None:
        self.graph, self.times, self.ties = program.graph, program.times, tie_layers(program)
        self.factors, self.params, self.cost_model = factors, program.params(), cost
        self.carried, self.given = program.carried(factors), program.given(factors)
        self.candidates = worth_dividing(factors, set(self.params))
        self.quantities = Quantities(self.graph, factors)
        self.live = descendants(self.graph, {*self.params, *self.given})
        self.bytes = {
            v: self.quantities.bytes(v) for v in (*self.params, *self.given, *self.live) if results(v)
        }
        self.uses = self._uses(program.beside_losses())
        own = held_elsewhere(factors)
        matrices = {v: self.bytes[v] for v in self.params if matrix(v) and v in self.uses and v not in own}
        share = shares(matrices, self.params)
        limit = 0.0 if divide_small else SMALL
        self.large = {v for v in matrices if share[v] >= limit}
        self.little = {v for v in matrices if share[v] < limit}
        roots = set(self.params)
        self.later = program.layout is not None
        self.weights = {v for v in self.bytes if weight_root(v, roots) is not None}

    def result(self, user: Node, value: Node, axis: int) -> Placement:
        """How the program's caller wants a result; what has no choices wants its operands whole."""
        carried = self.carried.get(value) if user.op == "output" else None
        return carried[axis] if carried else R

    def _uses(self, free: set[Node]) -> dict[Node, list[tuple[Node, int]]]:
        """All uses, but for results that nobody may ever want whole."""
        found: dict[Node, list[tuple[Node, int]]] = {}
        for node in self.graph.nodes:
            if node.op == "output":
                for out in node.args[0]:
                    if (
                        isinstance(out, Node)
                        and self.carried.get(out, ()) is not None
                        and out not in free
                        and isinstance(out.meta["val"], torch.Tensor)
                    ):
                        found.setdefault(out, []).append((node, 0))
            elif node in self.live and node.target is not operator.getitem and node.target not in SHAPE_ONLY:
                for i, operand in enumerate(operands(node)):
                    found.setdefault(operand, []).append((node, i))
        return found


def descendants(graph: Graph, params: set[Node]) -> dict[Node, None]:
    """Call nodes below a parameter, in graph order; all else (masks, rotary tables) is replicated."""
    found: dict[Node, None] = {}
    for node in graph.nodes:
        if node.op == "call_function" and any(i in params or i in found for i in node.all_input_nodes):
            found[node] = None
    return found

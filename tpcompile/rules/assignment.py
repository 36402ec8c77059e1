"""What the planner decided on one axis of the mesh."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from tpcompile.ir.nodes import producer
from tpcompile.ir.placements import Placement, R

from .choices import Choice


@dataclass
class Assignment:
    """The decisions on one axis.

    Attributes:
        ranks: the size of the axis.
        nodes: per call node, how it is computed.
        params: per parameter placeholder, how it is held.
        shared: per value with several uses, the placement in which it is handed on.
        penalty: what large parameters that are not divided were charged: over all axes, the sum counts.
        price: what small parameters that are not divided were charged, likewise.
        cost: the modelled time in seconds, likewise.
    """

    ranks: int
    nodes: dict[Node, Choice] = field(default_factory=dict)
    params: dict[Node, Placement] = field(default_factory=dict)
    shared: dict[Node, Placement] = field(default_factory=dict)
    penalty: float = 0.0
    price: float = 0.0
    cost: float = 0.0

    def output(self, value: Node) -> Placement:
        """The placement in which a value is computed."""
        if value in self.params:
            return self.params[value]
        node, result = producer(value)
        choice = self.nodes.get(node)
        return choice.outputs[result] if choice else R

    def need(self, node: Node, operand: int) -> Placement:
        """The placement in which a node wants an operand."""
        choice = self.nodes.get(node)
        return choice.inputs[operand] if choice else R

"""InsertGradientCopies: whole values used by divided computations, so that their gradients are summed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from tpcompile.ir.graph_edit import call_behind, with_operands
from tpcompile.ir.markers import MARKERS, copy_to_ranks
from tpcompile.ir.nodes import has_fractions, is_tensor, operands
from tpcompile.ir.placements import Owned, Partial, Replicate
from tpcompile.planner.global_program import GlobalProgram, Pass
from tpcompile.rules.choices import Choice
from tpcompile.rules.rule import Rule


@dataclass(frozen=True)
class InsertGradientCopies(Pass):
    """Inserts ``copy_to_ranks`` before operands that are whole in a computation that is not.

    Each rank then has a summand of the operand's gradient, so the placement pair changes from
    (whole, whole gradient) to (whole, partial gradient); the copy's backward reduces. Uses that share
    an operand share the copy, so q, k and v cost one reduction. Only values that lead to a parameter
    or to a differentiable input need it, and only where gradients are recorded.
    """

    name = "insert-gradient-copies"
    enabled: bool = True

    def apply(self, program: GlobalProgram) -> bool:
        if not self.enabled:
            return False
        differentiable = differentiable_values(program)
        made: dict[tuple[Node, tuple[int, ...]], Node] = {}

        def copied(value: Node, on: tuple[int, ...], like: Node) -> Node:
            if not on or value not in differentiable:
                return value
            if (value, on) not in made:
                placement = value.meta["placement"]
                made[value, on] = call_behind(value, copy_to_ranks, value, on, placement=placement, like=like)
            return made[value, on]

        for node in list(program.graph.nodes):
            if node.op != "call_function" or node.target in MARKERS or not node.meta.get("choices"):
                continue
            varying = [_varying(program, node, choice) for choice in node.meta["choices"]]
            new = [
                copied(value, tuple(axis for axis, of in enumerate(varying) if i in of), node)
                for i, value in enumerate(operands(node))
            ]
            node.args, node.kwargs = with_operands(node, new)
        return bool(made)


def _varying(program: GlobalProgram, node: Node, choice: Choice | None) -> set[int]:
    """Operands that are whole on an axis on which the computation is divided or partial."""
    if choice is None:
        return set()
    rule = program.decided.rules.get(node) if program.decided else None
    if isinstance(rule, Rule) and rule.declared is not None:
        return set(rule.declared.summed)
    divided = choice.factor is not None or any(isinstance(o, Partial | Owned) for o in choice.outputs)
    arity = len(operands(node))
    return {i for i in range(arity) if divided and isinstance(choice.inputs[i], Replicate)}


_DIFFERENTIABLE = ("param", "attribute", "user")


def differentiable_values(program: GlobalProgram) -> set[Node]:
    """Values through which a gradient may flow to a parameter or to an input."""
    found: set[Node] = set()
    for node in program.graph.nodes:
        if not is_tensor(node) and node.op != "call_function":
            continue
        if node.op == "placeholder":
            if _carries_gradient(node) and program.sources[node].spec.kind in _DIFFERENTIABLE:
                found.add(node)
        elif node.op == "call_function" and node.target is not torch.ops.aten.detach.default:
            if any(i in found for i in node.all_input_nodes) and _carries_gradient(node):
                found.add(node)
    return found


def _carries_gradient(node: Node) -> bool:
    val = node.meta["val"]
    return not isinstance(val, torch.Tensor) or has_fractions(val)

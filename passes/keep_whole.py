"""KeepWhole: what some modules take or give is whole, as a plan says that is taken literally."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from tpcompile.ir.graph_edit import call_before, call_behind
from tpcompile.ir.markers import keep_whole
from tpcompile.ir.nodes import module_path, operands
from tpcompile.planner.global_program import GlobalProgram, Pass
from tpcompile.planner.search.must_divide import weight_root
from tpcompile.rules.rule import Rule
from tpcompile.rules.table import rule_of


@dataclass(frozen=True)
class KeepWhole(Pass):
    """Puts the marker ``keep_whole`` before, or behind, the matmuls and lookups of some modules.

    The planner then brings these values together at once: nothing that follows is divided because of
    them, and no partial sum is carried on.

    Attributes:
        results: the names of the modules whose results are whole.
        inputs: the names of those whose inputs are.
    """

    name = "keep-whole"
    results: frozenset[str] = frozenset()
    inputs: frozenset[str] = frozenset()

    def apply(self, program: GlobalProgram) -> bool:
        params = set(program.params())
        found = [n for n in program.graph.nodes if _multiplies(n, params)]
        before = [n for n in found if module_path(n) in self.inputs]
        after = [n for n in found if module_path(n) in self.results]
        for node in before:
            given = next((o for o in operands(node) if weight_root(o, params) is None), None)
            if given is not None:
                node.replace_input_with(given, call_before(node, keep_whole, given))
        for node in after:
            held = call_behind(node, keep_whole, node)
            node.replace_all_uses_with(held, delete_user_cb=lambda user, held=held: user is not held)
        return bool(before or after)


def _multiplies(node: Node, params: set[Node]) -> bool:
    if node.op != "call_function" or not operands(node):
        return False
    if not any(weight_root(operand, params) for operand in operands(node)):
        return False
    rule = rule_of(node)
    return isinstance(rule, Rule) and rule.contraction

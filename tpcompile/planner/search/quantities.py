"""How much a graph computes and moves: operations, bytes, and the example's dynamic sizes."""

from __future__ import annotations

import math

import torch
from torch.fx import Graph, Node

from tpcompile.errors import OnlyInParts
from tpcompile.ir.nodes import module_path, results
from tpcompile.ir.sizes import Size, bytes_of, hint
from tpcompile.rules.factors import Factors
from tpcompile.rules.rule import Rule, letters_of


class Quantities:
    """Counts for the nodes of one graph; dynamic sizes are the example's.

    Args:
        graph: the captured graph at global shapes.
        factors: its rules and factors.
    """

    def __init__(self, graph: Graph, factors: Factors) -> None:
        self.factors = factors
        self.hints = symbol_hints(graph)
        self._numbers: dict[Size, float] = {}
        self._operations: dict[Node, float] = {}

    def bytes(self, value: Node) -> float:
        """The size of a value, of the largest result where there are several.

        Raises:
            OnlyInParts: the data decides its shape.
        """
        found = max(map(bytes_of, results(value)))
        if not math.isfinite(found):
            raise OnlyInParts(
                f"the shape of what {value.target} computes is decided by the data",
                where=module_path(value),
                todo="choose with torch.where or a mask of fixed size, or parallelize(compose=True)",
            )
        return found

    def number(self, size: Size) -> float:
        """A size as a number, dynamic dimensions as in the example."""
        if isinstance(size, int):
            return float(size)
        if size not in self._numbers:  # substituting is slow, and a model has few different sizes
            self._numbers[size] = float(size.subs(self.hints))
        return self._numbers[size]

    def operations(self, node: Node) -> float:
        """The arithmetic of a matmul-like node, 0 for any other."""
        if node not in self._operations:
            rule = self.factors.rules.get(node)
            counts = isinstance(rule, Rule) and rule.contraction
            self._operations[node] = self._contract(rule) if counts else 0.0  # type: ignore[arg-type]
        return self._operations[node]

    def _contract(self, rule: Rule) -> float:
        """Operands multiplied one after the other, so that attention is two matmuls.

        A letter that one operand alone has, and no result, selects (a vocabulary, grouped experts) and
        costs nothing; operands that bring no new letter (masks, biases) are added.
        """
        terms = [letters_of(t) for i, t in enumerate(rule.inputs) if i not in rule.once]
        seen = frozenset[str]().union(*terms[:2])
        terms = terms[:2] + [t for t in terms[2:] if not t <= seen]
        kept = frozenset[str]().union(*map(letters_of, rule.outputs))
        alone = {x for t in terms for x in t - kept if sum(x in other for other in terms) == 1}
        total, have = 0.0, terms[0] - alone
        for i, term in enumerate(terms[1:], 1):
            have |= term - alone
            total += 2 * math.prod(self.number(rule.sizes[x]) for x in have)
            have &= kept.union(*terms[i + 1 :])
        return total


def symbol_hints(graph: Graph) -> dict[object, int]:
    """The example's sizes of the dynamic dimensions."""
    hints: dict[object, int] = {}
    for node in graph.find_nodes(op="placeholder"):
        if isinstance(node.meta.get("val"), torch.Tensor):
            for size in node.meta["val"].shape:
                if isinstance(size, torch.SymInt):
                    hints[size.node.expr] = int(hint(size))
    return hints

"""What a node can do on one axis of the mesh, derived from its rule and its factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.fx import Node

from tpcompile.ir.nodes import operands, results
from tpcompile.ir.placements import Owned, P, Partial, Placement, R, Shard

from .declared import placements_on
from .expert_rows import Carrier
from .factors import Factors, OpFactor
from .rule import Rule


@dataclass(frozen=True)
class Choice:
    """One way to compute a node on one axis.

    Attributes:
        inputs: the placement that each operand must have.
        outputs: the placement of each result.
        factor: the factor that is divided, if one is.
    """

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    factor: OpFactor | None = None

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.inputs))}) -> {', '.join(map(str, self.outputs))}"


def choices(
    node: Node, factors: Factors, may_divide: Callable[[OpFactor], bool], axis_sizes: Sequence[int]
) -> list[Choice]:
    """All ways to compute a call node, in the order that breaks ties: whole, divided, partial, owned.

    Args:
        node: the call.
        factors: the factors of its graph.
        may_divide: which factors may be divided.
        axis_sizes: the sizes of the sub-axes before this one, and its own.
    """
    arity, width = len(operands(node)), len(results(node))
    found = [whole(arity, width)]
    rule = factors.rules.get(node)
    if not isinstance(rule, Rule):
        return found
    if rule.declared is not None:
        lie = tuple(placements_on(factors, node, rule.declared, axis_sizes))
        return [Choice(lie[:arity], lie[arity:])]
    for factor in factors.op_factors(node):
        if may_divide(factor) and _reduces_numbers(node, factor):
            found.append(_divided(factor, rule))
    for group in rule.linear:
        if group:
            outputs = tuple(R if i in rule.fixed else P for i in range(width))
            found.append(Choice(tuple(P if i in group else R for i in range(arity)), outputs))
    for carrier in factors.carriers.get(node, ()):
        owned = _owned(node, carrier, factors)
        if owned.factor is None or may_divide(owned.factor):
            found.append(owned)
    return found


def _owned(node: Node, carrier: Carrier, factors: Factors) -> Choice:
    """Rows of experts: where they begin, whole experts are divided."""
    ids, units = carrier.tag
    inputs: list[Placement] = [R if dim is None else Owned(dim, ids, units) for dim in carrier.inputs]
    outputs = tuple(Owned(dim, ids, units) for dim in carrier.outputs)
    if carrier.stack is None:
        return Choice(tuple(inputs), outputs)
    inputs[carrier.stack] = Shard(0)
    atoms = factors.atoms(operands(node)[carrier.stack], 0)
    at = tuple((0, 0) if i == carrier.stack else None for i in range(len(inputs)))
    factor = OpFactor(atoms[0] if len(atoms) == 1 else -1, units, at, (None,) * len(outputs), "")
    return Choice(tuple(inputs), outputs, factor)


def whole(arity: int, width: int) -> Choice:
    """Every rank computes the node as a whole."""
    return Choice((R,) * arity, (R,) * width)


def _reduces_numbers(node: Node, factor: OpFactor) -> bool:
    """A partial result must be a number: truth values cannot be summed."""
    missing = any(p is None for p in factor.outputs)
    return not missing or all(r.dtype.itemsize > 1 for r in results(node))


def _divided(factor: OpFactor, rule: Rule) -> Choice:
    inputs: list[Placement] = []
    for i, place in enumerate(factor.inputs):
        if place is not None:
            inputs.append(Shard(*place))
        else:
            inputs.append(P if i in rule.once and factor.reduce == "sum" and _reduced(factor) else R)
    outputs = tuple(
        _missing(i, factor, rule) if p is None else Shard(*p) for i, p in enumerate(factor.outputs)
    )
    return Choice(tuple(inputs), outputs, factor)


def _missing(result: int, factor: OpFactor, rule: Rule) -> Placement:
    """How a result is placed that does not have the divided factor."""
    return R if result in rule.fixed else Partial(factor.reduce)


def _reduced(factor: OpFactor) -> bool:
    return any(place is None for place in factor.outputs)

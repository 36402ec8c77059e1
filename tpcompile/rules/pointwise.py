"""Rules of elementwise operators, with broadcasting, and which of them let a partial sum through."""

from __future__ import annotations

import torch
from torch.fx import Node

from .rule import Dim, Letters, Rule, Size, argument, operands, results, shape, sizes_of

_ADDITIVE = {"add", "sub"}
_UNARY_LINEAR = {"neg", "clone", "alias", "detach", "real", "imag", "positive", "lift_fresh_copy"}
_CASTS = {"_to_copy", "to", "type_as", "_cast_Float", "_cast_Double", "_cast_Half"}


def op_name(node: Node) -> str:
    """``add`` for ``aten.add.Tensor``."""
    target = node.target
    return target._schema.name.split("::")[1] if isinstance(target, torch._ops.OpOverload) else str(target)


def broadcast(node: Node) -> Rule:
    """Operands aligned from the right; an operand of size 1 carries no letter there."""
    letters = Letters()
    out = sizes_of(results(node)[0])
    dims = letters.dims(out)
    ops = operands(node)
    inputs = tuple(_aligned(shape(o), out, dims) for o in ops)
    return Rule(
        inputs, tuple(dims for _ in results(node)), letters.sizes, linear=tuple(linear_operands(node, ops))
    )


def _aligned(source: tuple[Size, ...], out: tuple[Size, ...], dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
    pad = len(out) - len(source)
    return tuple(dims[pad + i] if size == out[pad + i] else () for i, size in enumerate(source))


def linear_operands(node: Node, ops: list[Node]) -> list[frozenset[int]]:
    """Sets of operands in which the operator is linear, so that ``f(P, ...) = P(f)``.

    Tempting but wrong: ``P + scalar`` (every rank would add it), ``x * x``, a cast to a narrower
    type (rounds the summands, not the sum), ``div`` in its second operand.
    """
    name = op_name(node)
    if name in _ADDITIVE:
        return [frozenset(range(len(ops)))] if len(ops) == 2 else []
    if name in _UNARY_LINEAR:
        return [frozenset({0})]
    if name == "mul":
        return [frozenset({i}) for i in range(len(ops))] if len({id(o) for o in ops}) == len(ops) else []
    if name == "div":
        exact = argument(node, 3, "rounding_mode") is None
        return [frozenset({0})] if exact and isinstance(node.args[0], Node) and ops[0] not in ops[1:] else []
    if name == "where":
        return [frozenset({1, 2})] if len(ops) == 3 else []
    if name in _CASTS:
        return [frozenset({0})] if _widens(ops[0], node) else []
    return []


def _widens(source: Node, node: Node) -> bool:
    old, new = source.meta["val"].dtype, results(node)[0].dtype
    if not (old.is_floating_point and new.is_floating_point):
        return False
    return old == new or torch.finfo(new).bits > torch.finfo(old).bits

"""Rules of elementwise operators, with broadcasting, and which of them let a partial sum through."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.fx import Node

from tpcompile.ir.nodes import op_name, operands, option, results, shape
from tpcompile.ir.sizes import sizes_of

from .rule import Labels, Letters, Rule, aligned, letters_of

Linear = list[frozenset[int]]

# Results that do not depend on values: all of those of factories, and the mask of a dropout that is off.
_VALUELESS = {
    **dict.fromkeys(("zeros_like", "ones_like", "full_like", "empty_like", "uniform"), 0),
    "native_dropout": 1,
}


def broadcast(node: Node) -> Rule:
    """Operands aligned from the right; an operand of size 1 carries no letter there."""
    letters = Letters()
    dims = letters.dims(sizes_of(results(node)[0]))
    ops = operands(node)
    return Rule(
        tuple(aligned(shape(o), dims) for o in ops),
        tuple(dims for _ in results(node)),
        letters.sizes,
        linear=tuple(linear_operands(node, ops)),
        fixed=frozenset({_VALUELESS[op_name(node)]} if op_name(node) in _VALUELESS else ()),
    )


def type_as(node: Node) -> Rule:
    """``x.type_as(y)``: of y nothing but its type is used; it is placed like x where it has x's shape."""
    x, y = operands(node)
    letters = Letters()
    dims = letters.dims(shape(x))
    same = shape(x) == shape(y)
    other = dims if same else letters.dims(shape(y))
    linear = [frozenset({0}), frozenset({0, 1})] if same else [frozenset({0})]
    return Rule(
        (dims, other),
        (dims,),
        letters.sizes,
        whole=frozenset() if same else letters_of(other),
        linear=tuple(linear) if _widens(x, node) else (),
    )


def prelu(node: Node) -> Rule:
    """A slope for all of ``x``, or one per channel."""
    letters = Letters()
    source, weight = operands(node)
    dims = letters.dims(shape(source))
    slope: Labels = ((),) if shape(weight) == (1,) else (dims[1],)
    return Rule((dims, slope[: len(shape(weight))]), (dims,), letters.sizes)


def linear_operands(node: Node, ops: list[Node]) -> Linear:
    """Sets of operands in which the operator is linear, so that ``f(P, ...) = P(f)``.

    Tempting but wrong: ``P + scalar`` (every rank would add it), ``x * x``, a cast to a narrower
    type (rounds the summands, not the sum), ``div`` in its second operand, ``polar`` in its lengths
    (torch's gradient of it is right for positive ones only). Right for finite numbers only: what multiplies
    with or divides by a tensor (``addcmul``, ``addcdiv``, ``lerp``, ``div``): summands with two signs, times
    infinity, are not a number, where their sum times it is infinite.
    """
    return _LINEAR.get(op_name(node), _nothing)(node, ops)


def _nothing(node: Node, ops: list[Node]) -> Linear:
    return []


def _unary(node: Node, ops: list[Node]) -> Linear:
    return [frozenset({0})]


def _both(node: Node, ops: list[Node]) -> Linear:
    return [frozenset({0, 1})] if len(ops) == 2 else []


def _each(node: Node, ops: list[Node]) -> Linear:
    """Not times a number that is infinite; nor times a tensor of as many numbers, which may be.

    Rows and columns may be scaled, which is a limit (docs/proof.md): experts' rows are weighed and then added
    up, and of fewer rows there is less to send. Times as many numbers, that is before or behind the same.
    """
    if any(isinstance(a, float) and not math.isfinite(a) for a in node.args):
        return []
    if len(ops) == 1:
        return [frozenset({0})]
    dims = [sum(size != 1 for size in shape(o)) for o in ops]
    return [frozenset({i}) for i in (0, 1) if dims[1 - i] < dims[i]]


def _numerator(node: Node, ops: list[Node]) -> Linear:
    exact = option(node, "rounding_mode") is None and node.args[1] != 0
    return [frozenset({0})] if exact and len(ops) == 1 and ops[0] is node.args[0] else []


def _choose(node: Node, ops: list[Node]) -> Linear:
    """``where(c, x, y)``: both branches, or the only one that is not a zero."""
    if len(ops) == 3:
        return [frozenset({1, 2})]
    scalars = [option(node, name) for name in ("self", "other")]
    return [frozenset({1})] if len(ops) == 2 and 0 in [s for s in scalars if not isinstance(s, Node)] else []


def _fill(node: Node, ops: list[Node]) -> Linear:
    """``masked_fill(x, mask, value)``: with zeros, or with a value that is a summand itself."""
    if len(ops) == 3:
        return [frozenset({0, 2})]
    return [frozenset({0})] if option(node, "value") == 0 else []


def _copy(node: Node, ops: list[Node]) -> Linear:
    """``copy(x, y)``, ``fill(x, y)`` are y in x's form: x's values are lost, whole or partial."""
    if len(ops) < 2 or ops[0].meta["val"].dtype != ops[1].meta["val"].dtype:
        return []
    return [frozenset({1}), frozenset({0, 1})]


def _cast(node: Node, ops: list[Node]) -> Linear:
    return [frozenset({0})] if _widens(ops[0], node) else []


def _widens(source: Node, node: Node) -> bool:
    old, new = source.meta["val"].dtype, results(node)[0].dtype
    if not (old.is_floating_point and new.is_floating_point):
        return False
    return bool(old == new or torch.finfo(new).bits > torch.finfo(old).bits)


_LINEAR: dict[str, Callable[[Node, list[Node]], Linear]] = {
    **dict.fromkeys(
        ("neg", "positive", "conj_physical", "_conj", "real", "imag", *_VALUELESS),
        _unary,
    ),
    # Those that draw numbers have no rule.
    **dict.fromkeys(("dropout", "feature_dropout", "alpha_dropout"), _unary),
    **dict.fromkeys(("add", "sub", "rsub", "complex", "lerp"), _both),
    **dict.fromkeys(("_to_copy", "to"), _cast),
    "mul": _each,
    "div": _numerator,
    "where": _choose,
    "masked_fill": _fill,
    **dict.fromkeys(("copy", "fill"), _copy),
}

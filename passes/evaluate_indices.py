"""Finds what the integer and truth values of a graph are, operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node

from tpcompile.ir.nodes import argument, shape

from .index_values import FALSE, Affine, Known, Truth, combined, each, normal

aten = torch.ops.aten


class IndexValues:
    """Finds what values of a graph are; None for what is not a function of the position alone."""

    def __init__(self) -> None:
        self._found: dict[Node, Known | None] = {}

    def of(self, node: Any) -> Known | None:
        """The value of a node, or of a number."""
        if isinstance(node, bool):
            return Truth() if node else FALSE
        if isinstance(node, int):
            return Affine(sympy.Integer(node), ())
        if not isinstance(node, Node) or node.op != "call_function":
            return None
        if node not in self._found:
            self._found[node] = None  # until it is known
            rule = _RULES.get(node.target)
            if rule is not None and isinstance(node.meta.get("val"), torch.Tensor):
                found = rule(self, node)
                self._found[node] = normal(found, shape(node)) if found is not None else None
        return self._found[node]

    def affine(self, node: Any) -> Affine | None:
        """The value of a node if it is an integer one; truth values that are constant count as 0 and 1."""
        found = self.of(node)
        if found == FALSE:
            return Affine(sympy.Integer(0), (sympy.Integer(0),) * len(shape(node)))
        return found if isinstance(found, Affine) else None


Rule = Callable[[IndexValues, Node], Known | None]


def _number(arg: Any) -> sympy.Expr | None:
    """A python number or a symbolic size as an expression."""
    val = arg.meta.get("val") if isinstance(arg, Node) else arg
    if isinstance(val, torch.SymInt):
        return val.node.expr
    return sympy.Integer(val) if isinstance(val, int) and not isinstance(val, bool) else None


def _arange(values: IndexValues, node: Node) -> Known | None:
    start: sympy.Expr | None = sympy.Integer(0)
    step: sympy.Expr | None = sympy.Integer(1)
    if node.target is not aten.arange.default:
        start = _number(argument(node, 0, "start"))
    if node.target is aten.arange.start_step:
        step = _number(argument(node, 2, "step", 1))
    integer = not node.meta["val"].dtype.is_floating_point
    return Affine(start, (step,)) if integer and start is not None and step is not None else None


def _full(values: IndexValues, node: Node) -> Known | None:
    filled = {aten.ones.default: 1, aten.zeros.default: 0}
    fill = filled[node.target] if node.target in filled else argument(node, 1, "fill_value")
    val = node.meta["val"]
    if val.dtype == torch.bool:
        return Truth() if fill else FALSE
    number = _number(fill)
    return None if number is None or val.dtype.is_floating_point else Affine(number, ())


def _same(values: IndexValues, node: Node) -> Known | None:
    source = argument(node, 0, "self")
    kept = isinstance(source, Node) and source.meta["val"].dtype == node.meta["val"].dtype
    return values.of(source) if kept else None


def _sum(sign: int) -> Rule:
    def rule(values: IndexValues, node: Node) -> Known | None:
        a, b = (_operand(values, arg) for arg in node.args[:2])
        if a is None or b is None or len(node.args) > 2 or node.kwargs:
            return None
        return combined(a, b, sign)

    return rule


def _operand(values: IndexValues, arg: Any) -> Affine | None:
    number = _number(arg)
    if number is not None:
        return Affine(number, ())
    is_integer = isinstance(arg, Node) and not arg.meta["val"].dtype.is_floating_point
    return values.affine(arg) if is_integer else None


def _compared(strict: bool, swapped: bool) -> Rule:
    """``a >= b`` and its like, as ``a - b - strict >= 0``."""

    def rule(values: IndexValues, node: Node) -> Known | None:
        a, b = (_operand(values, arg) for arg in node.args[:2])
        if a is None or b is None:
            return None
        difference = combined(b, a, -1) if swapped else combined(a, b, -1)
        return Truth(frozenset({Affine(difference.start - int(strict), difference.steps)}))

    return rule


def _equal(wanted: bool) -> Rule:
    """Whether two values are the same, where their difference is a number."""

    def rule(values: IndexValues, node: Node) -> Known | None:
        a, b = (_operand(values, arg) for arg in node.args[:2])
        difference = None if a is None or b is None else combined(a, b, -1)
        if difference is None or not difference.constant() or not difference.start.is_number:
            return None
        return Truth() if (difference.start == 0) == wanted else FALSE

    return rule


def _both(values: IndexValues, node: Node) -> Known | None:
    if node.meta["val"].dtype != torch.bool:
        return None
    a, b = (values.of(arg) for arg in node.args[:2])
    if FALSE in (a, b):
        return FALSE
    if not isinstance(a, Truth) or not isinstance(b, Truth):
        return None
    rank = len(shape(node))
    zero = Affine(sympy.Integer(0), (sympy.Integer(0),) * rank)  # adding it aligns dimensions
    every = [combined(zero, c, 1) for c in (*a.conditions, *b.conditions)]
    return Truth(frozenset(every))


def _moved(values: IndexValues, node: Node) -> Known | None:
    """Dimensions added or exchanged."""
    found, rank = values.of(argument(node, 0, "self")), len(shape(node))
    if node.target is aten.t.default:
        order: list[int | None] = [*range(rank)][::-1]
    elif node.target is aten.unsqueeze.default:
        at = argument(node, 1, "dim") % rank
        order = [*range(at), None, *range(at, rank - 1)]
    elif node.target is aten.permute.default:
        order = [d % rank for d in argument(node, 1, "dims")]
    else:
        a, b = (argument(node, i, name) % rank for i, name in ((1, "dim0"), (2, "dim1")))
        swapped = list(range(rank))
        swapped[a], swapped[b] = swapped[b], swapped[a]
        order = [*swapped]

    def move(value: Affine) -> Affine:
        zero = sympy.Integer(0)
        return Affine(value.start, tuple(zero if d is None else value.steps[d] for d in order))

    return each(found, move)


def _slice(values: IndexValues, node: Node) -> Known | None:
    source = argument(node, 0, "self")
    dim = argument(node, 1, "dim", 0) % len(shape(source))
    start, step = argument(node, 2, "start") or 0, argument(node, 4, "step", 1)
    if not isinstance(start, int) or start < 0 or not isinstance(step, int):
        return None

    def cut(value: Affine) -> Affine:
        steps = tuple(s * step if d == dim else s for d, s in enumerate(value.steps))
        return Affine(value.start + value.steps[dim] * start, steps)

    return each(values.of(source), cut)


def _diff(values: IndexValues, node: Node) -> Known | None:
    """Differences along a dimension, of a value that what is put before it continues."""
    x = values.affine(node.args[0])
    n, dim = argument(node, 1, "n", 1), argument(node, 2, "dim", -1) % len(shape(node))
    before = argument(node, 3, "prepend")
    if x is None or n != 1 or argument(node, 4, "append") is not None:
        return None
    step = x.steps[dim]
    if before is not None:
        first = values.affine(before)
        if first is None or shape(before)[dim] != 1:
            return None
        gap = combined(x, first, -1)  # at the first index of the dimension
        if any(s != 0 for d, s in enumerate(gap.steps) if d != dim):
            return None
        if shape(node)[dim] == 1:  # there is no difference but this one
            step = gap.start
        elif sympy.expand(gap.start - step) != 0:
            return None
    return Affine(step, (sympy.Integer(0),) * len(x.steps))


def _cumsum(values: IndexValues, node: Node) -> Known | None:
    x = values.affine(node.args[0])
    zero = x is not None and x.constant() and x.start == 0
    return x if zero and not node.meta["val"].dtype.is_floating_point else None


def _index(values: IndexValues, node: Node) -> Known | None:
    """A value at other positions, which are functions of the position themselves."""
    source, indices = node.args[0], argument(node, 1, "indices")
    found, sizes = values.of(source), shape(source)  # type: ignore[arg-type]
    if found is None or len(indices) != len(sizes) or any(i is None for i in indices):
        return None
    places: list[Affine] = []
    for index in indices:
        place = values.affine(index) if index.meta["val"].dtype != torch.bool else None
        least = place.least(shape(index)) if place is not None else None
        if place is None or least is None or not least.is_nonnegative:  # from the end, maybe
            return None
        places.append(place)

    def at(value: Affine) -> Affine:
        total = Affine(value.start, (sympy.Integer(0),) * len(shape(node)))
        for step, place in zip(value.steps, places, strict=True):
            total = combined(total, Affine(step * place.start, tuple(step * s for s in place.steps)), 1)
        return total

    return each(found, at)


_RULES: dict[Any, Rule] = {
    aten.arange.default: _arange,
    aten.arange.start: _arange,
    aten.arange.start_step: _arange,
    aten.full.default: _full,
    aten.ones.default: _full,
    aten.zeros.default: _full,
    aten.clone.default: _same,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten._to_copy.default: _same,
    aten.expand.default: _same,
    aten.add.Tensor: _sum(1),
    aten.sub.Tensor: _sum(-1),
    aten.ge.Tensor: _compared(strict=False, swapped=False),
    aten.ge.Scalar: _compared(strict=False, swapped=False),
    aten.gt.Tensor: _compared(strict=True, swapped=False),
    aten.gt.Scalar: _compared(strict=True, swapped=False),
    aten.le.Tensor: _compared(strict=False, swapped=True),
    aten.le.Scalar: _compared(strict=False, swapped=True),
    aten.lt.Tensor: _compared(strict=True, swapped=True),
    aten.lt.Scalar: _compared(strict=True, swapped=True),
    aten.eq.Tensor: _equal(True),
    aten.eq.Scalar: _equal(True),
    aten.ne.Tensor: _equal(False),
    aten.ne.Scalar: _equal(False),
    aten.__and__.Tensor: _both,
    aten.bitwise_and.Tensor: _both,
    aten.logical_and.default: _both,
    aten.unsqueeze.default: _moved,
    aten.permute.default: _moved,
    aten.transpose.int: _moved,
    aten.t.default: _moved,
    aten.slice.Tensor: _slice,
    aten.diff.default: _diff,
    aten.cumsum.default: _cumsum,
    aten.index.Tensor: _index,
}

"""Sizes of dimensions: numbers, or expressions where they are dynamic."""

from __future__ import annotations

import functools
import math
from typing import Any, TypeAlias

import sympy
import torch

from tpcompile.ir.torch_internals import FloorDiv, Mod

Size: TypeAlias = int | sympy.Expr


def sizes_of(tensor: torch.Tensor) -> tuple[Size, ...]:
    """The shape, dynamic dimensions as sympy expressions."""
    return tuple(map(size_of, tensor.shape))


def size_of(size: int | torch.SymInt) -> Size:
    """A size or stride, a dynamic one as a sympy expression."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    simple = simplify_size(size.node.expr)
    return int(simple) if simple.is_Integer else simple


def divide(a: Size, b: Size) -> Size | None:
    """``a / b`` if ``b`` divides ``a`` for every value of the symbols, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    return _divide(a, b)


@functools.lru_cache(maxsize=4096)
def _divide(a: Size, b: Size) -> Size | None:
    quotient = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    if sympy.denom(quotient) != 1:
        return None
    return int(quotient) if quotient.is_Integer else quotient


def hint(size: int | torch.SymInt) -> float:
    """The example's size; infinite where only a run can tell it."""
    if not isinstance(size, torch.SymInt):
        return size
    return math.inf if size.node.hint is None else int(size.node.hint)


def bytes_of(tensor: torch.Tensor) -> float:
    """How many bytes a tensor has, for the example's sizes."""
    return math.prod(map(hint, tensor.shape)) * tensor.element_size()


@functools.lru_cache(maxsize=4096)
def simplify_size(expression: Any) -> Any:
    """Returns an equal expression in which a size that was filled up to a multiple is that multiple.

    A model that works in chunks of ``c`` fills ``n`` up by ``(c - n % c) % c``. torch does not see that the
    sum is ``c * ceil(n / c)``, so that a chunk's length stays an expression and equal sizes look different.
    """
    if not isinstance(expression, sympy.Basic):
        return expression
    chunks: dict[sympy.Symbol, sympy.Expr] = {}
    filled: dict[sympy.Expr, sympy.Expr] = {}
    for fill in expression.atoms(Mod):
        found = _fill(fill)
        if found is not None:
            size, multiple = found
            count = sympy.Symbol(f"chunks_{multiple}_{size}", positive=True, integer=True)
            filled[fill] = multiple * count - size
            chunks[count] = FloorDiv(size + multiple - 1, multiple)
    if not filled:
        return expression
    simple = expression.xreplace(filled)
    if not simple.is_Relational and not simple.is_Boolean:
        simple = sympy.expand(simple)
    return simple.xreplace(chunks)


def _fill(fill: Any) -> tuple[Any, Any] | None:
    """``n`` and ``c`` of ``(c - n % c) % c``."""
    rest, multiple = fill.args
    inner = multiple - rest
    if multiple.is_Integer and isinstance(inner, Mod) and inner.args[1] == multiple:
        return inner.args[0], multiple
    return None

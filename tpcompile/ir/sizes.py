"""Sizes that are filled up to a multiple: one form for what torch writes in many ways."""

from __future__ import annotations

import functools
from typing import Any

import sympy
from torch.utils._sympy.functions import FloorDiv, Mod


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

"""What integer and truth values in a graph are, as functions of the position: masks and positions, mostly.

An integer tensor that is made of ``arange`` is an affine function of its own indices; comparing two of them
gives a truth value that is a set of inequalities. This is enough to tell a causal mask from any other, at all
sizes, without running anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy


@dataclass(frozen=True)
class Affine:
    """An integer tensor: ``start + sum(steps[d] * index[d])``; a dimension of size 1 has step 0."""

    start: sympy.Expr
    steps: tuple[sympy.Expr, ...]

    def constant(self) -> bool:
        """Whether all elements are the same."""
        return all(s == 0 for s in self.steps)

    def least(self, sizes: Sequence[Any]) -> sympy.Expr | None:
        """The smallest element of a tensor of these sizes; None where the sign of a step is open."""
        total = self.start
        for step, size in zip(self.steps, sizes, strict=True):
            if step.is_negative:
                total += step * (size - 1)
            elif not step.is_nonnegative:
                return None
        return sympy.expand(total)


@dataclass(frozen=True)
class Truth:
    """A truth tensor: true where all conditions are ``>= 0``; without conditions, everywhere."""

    conditions: frozenset[Affine] = frozenset()


FALSE = "false"
"""A truth tensor that is false everywhere."""
Known = Affine | Truth | str


def normal(value: Known, sizes: Sequence[Any]) -> Known:
    """The value aligned to the last dimensions, step 0 where the size is 1, without idle conditions."""
    if isinstance(value, Affine):
        return _aligned(value, sizes)
    if isinstance(value, Truth):
        conditions = {_aligned(c, sizes) for c in value.conditions}
        return Truth(frozenset(c for c in conditions if not _holds(c, sizes)))
    return value


def _aligned(value: Affine, sizes: Sequence[Any]) -> Affine:
    steps = (sympy.Integer(0),) * (len(sizes) - len(value.steps)) + value.steps
    return Affine(
        sympy.expand(value.start),
        tuple(sympy.Integer(0) if size == 1 else step for step, size in zip(steps, sizes, strict=True)),
    )


def _holds(condition: Affine, sizes: Sequence[Any]) -> bool:
    least = condition.least(sizes)
    return least is not None and bool(least.is_nonnegative)


def combined(a: Affine, b: Affine, sign: int) -> Affine:
    """``a + sign * b``, broadcast."""
    rank = max(len(a.steps), len(b.steps))
    left, right = ((sympy.Integer(0),) * (rank - len(x.steps)) + x.steps for x in (a, b))
    steps = tuple(x + sign * y for x, y in zip(left, right, strict=True))
    return Affine(sympy.expand(a.start + sign * b.start), steps)


def each(value: Known | None, change: Callable[[Affine], Affine]) -> Known | None:
    if isinstance(value, Affine):
        return change(value)
    return Truth(frozenset(map(change, value.conditions))) if isinstance(value, Truth) else value

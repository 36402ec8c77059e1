"""Cases of single operators: how the random values of their operands are made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tpcompile.rules.choices import Choice
from tpcompile.runtime.verify.rule_program import Operand, RuleProgram


def real(*shape: int) -> Operand:
    """Doubles between 0.1 and 0.9, where every function of the tests is defined and smooth."""
    return Operand(shape, lambda s: torch.rand(s, dtype=torch.float64) * 0.8 + 0.1)


def signed(*shape: int) -> Operand:
    """Normally distributed doubles."""
    return Operand(shape, lambda s: torch.randn(s, dtype=torch.float64))


def single(*shape: int) -> Operand:
    """Normally distributed single-precision numbers."""
    return Operand(shape, torch.randn)


def tied(*shape: int) -> Operand:
    """Doubles of which many are the same: several are the largest."""
    return Operand(shape, lambda s: torch.randint(3, s).double())


def unknown(*shape: int) -> Operand:
    """The same, with a NaN in the first and in the last place."""

    def make(shape: tuple[int, ...]) -> Tensor:
        found = torch.randint(3, shape).double()
        found.view(-1)[[0, -1]] = torch.nan
        return found

    return Operand(shape, make)


def large(*shape: int) -> Operand:
    """Half-precision numbers, zero or so large that two add up to infinity."""
    return Operand(shape, lambda s: torch.randint(2, s).half() * 49152)


def broken(*shape: int) -> Operand:
    """Doubles with an infinite first row and a last one that is not a number."""

    def make(shape: tuple[int, ...]) -> Tensor:
        found = torch.randn(shape, dtype=torch.float64)
        found[0], found[-1] = torch.inf, torch.nan
        return found

    return Operand(shape, make)


def complex_(*shape: int) -> Operand:
    """Complex numbers."""
    return Operand(shape, lambda s: torch.randn(s, dtype=torch.complex128))


def ints(high: int, *shape: int) -> Operand:
    """Whole numbers from 0 up to ``high``, without it."""
    return Operand(shape, lambda s: torch.randint(high, s))


def bytes_(*shape: int) -> Operand:
    """Whole numbers of eight bits."""
    return Operand(shape, lambda s: torch.randint(-100, 100, s, dtype=torch.int8))


def distinct(high: int, *shape: int) -> Operand:
    """Whole numbers below ``high``, none twice in the last dimension (where they are written to)."""
    return Operand(shape, lambda s: torch.rand(*s[:-1], high).argsort(-1)[..., : s[-1]])


def ascending(*shape: int) -> Operand:
    """Doubles in ascending order along the last dimension."""
    return Operand(shape, lambda s: torch.rand(s, dtype=torch.float64).sort(-1).values)


def boolean(*shape: int) -> Operand:
    """Truth values."""
    return Operand(shape, lambda s: torch.rand(s) < 0.5)


def blame(program: RuleProgram, axis_sizes: tuple[int, ...], chosen: Sequence[Choice]) -> str:
    """What failed: the call, its rule, the choices."""
    how = "  x  ".join(map(str, chosen))
    return f"\n{program.case}\n  rule     {program.rule}\n  choice {how}\n  ranks    {axis_sizes}"

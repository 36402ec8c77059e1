"""The cases of single operators again, with values and sizes for which operators have cases of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tpcompile.ir.placements import Partial
from tpcompile.rules.choices import Choice
from tpcompile.runtime.verify.rule_program import Case, Operand, RuleProgram, map_operands, operands_of

SPECIAL = (torch.nan, torch.inf, -torch.inf, -0.0, 0.0)


def _with_specials(x: Tensor) -> Tensor:
    """Numbers some of which are none, infinite, or zeros of both signs: first, last, and spread between."""
    if not x.is_floating_point() or not x.numel():
        return x
    found = x.clone()
    at = torch.linspace(0, x.numel() - 1, min(len(SPECIAL), x.numel())).long()
    found.view(-1)[at] = torch.tensor(SPECIAL[: len(at)], dtype=x.dtype)
    return found


def _halved(x: Tensor) -> Tensor:
    return x.half() if x.is_floating_point() else x


def _counted_from_the_end(x: Tensor) -> Tensor:
    """Whole numbers below zero: positions from the end, where they are positions."""
    whole = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
    return x - (x.max() + 1) if whole and x.numel() else x


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "special": _with_specials,
    "half": _halved,
    "negative": _counted_from_the_end,
}


def changed(case: Case, change: Callable[[Tensor], Tensor]) -> Case | None:
    """A case with other values; None if these are the same."""
    made: dict[Operand, Operand] = {}

    def other(operand: Operand) -> Operand:
        def make(shape: tuple[int, ...]) -> Tensor:
            return change(operand.make(shape))

        return made.setdefault(operand, replace(operand, make=make))

    args, kwargs = map_operands((case.args, case.kwargs), other)
    values = [operand.make(operand.shape) for operand in operands_of(case)]
    if not any(change(value) is not value for value in values):
        return None
    return replace(case, args=args, kwargs=kwargs)


def emptied(case: Case) -> Iterator[Case]:
    """A case in which one of the sizes is zero, wherever it stands."""
    for size in sorted({s for operand in operands_of(case) for s in operand.shape if s > 2}):
        made: dict[Operand, Operand] = {}

        def other(operand: Operand, size: int = size, made: dict[Operand, Operand] = made) -> Operand:
            shape = tuple(0 if s == size else s for s in operand.shape)
            return made.setdefault(operand, replace(operand, shape=shape))

        args, kwargs = map_operands((case.args, case.kwargs), other)
        yield replace(case, args=_zeroed(args, size), kwargs=_zeroed(kwargs, size))


def _zeroed(arg: Any, size: int) -> Any:
    if isinstance(arg, list | tuple):
        return type(arg)(_zeroed(a, size) for a in arg)
    if isinstance(arg, dict):
        return {key: _zeroed(value, size) for key, value in arg.items()}
    return 0 if type(arg) is int and arg == size else arg


def program_of(case: Case) -> RuleProgram | None:
    """The program of a case; None if the operator does not take such values or sizes."""
    try:
        return RuleProgram(case)
    except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
        return None


def without_sums(chosen: list[Choice]) -> list[Choice]:
    """The ways in which no operand is a sum: of a summand, an infinite number makes what is not a number."""
    return [one for one in chosen if not any(isinstance(p, Partial) for p in one.inputs)]

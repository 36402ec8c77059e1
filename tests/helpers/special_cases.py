"""The cases of single operators again, with values and sizes for which operators have cases of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tpcompile.runtime.verify.rule_program import Case, Operand, RuleProgram, map_operands, operands_of


def _special(x: Tensor, infinite: bool) -> Tensor:
    """Real numbers of which some are the same, none, zeros of both signs, and perhaps infinite.

    Few rows and columns have any, or no number would be left of a matmul; and there are few zeros, of whose
    products with infinity kernels leave some out.
    """
    found = (x * 4).floor() / 4 + 0.125
    flat = found.view(-1)
    if flat.numel() > 4:
        flat[1], flat[-2], flat[flat.numel() // 2] = -0.0, 0.0, torch.nan
        if infinite:
            flat[0], flat[-1] = torch.inf, -torch.inf
    return found


def _from_the_end(x: Tensor) -> Tensor:
    """Whole numbers below zero: positions that are counted from the end, where they are positions."""
    return x - (x.max() + 1) if x.numel() else x


def _is_whole(x: Tensor) -> bool:
    return not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)


def _halved(half: torch.dtype, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: change(x).to(half) if x.dtype == torch.float64 else x


def _changes(half: torch.dtype, infinite: bool) -> Iterator[Callable[[Tensor], Tensor]]:
    """From the most that is asked of an operator to what more of them take."""

    def real(x: Tensor) -> Tensor:
        return _special(x, infinite) if x.dtype == torch.float64 else x

    def number(x: Tensor) -> Tensor:
        return _from_the_end(x) if _is_whole(x) else x

    for value in (_halved(half, real), real):
        yield lambda x, value=value: value(number(x))
        yield value
    yield number


def special(case: Case, half: torch.dtype, infinite: bool = True) -> RuleProgram | None:
    """The program of a case with special values; None if the operator takes none.

    Args:
        case: the call.
        half: a type of half precision, for what can be computed in it.
        infinite: some of the values are.
    """
    for change in _changes(half, infinite):
        if (found := _program(_changed(case, change))) is not None:
            return found
    return None


def empty(case: Case, which: int) -> RuleProgram | None:
    """The program of a case in which one of the sizes is zero, wherever it stands; None if it takes no such.

    Args:
        case: the call.
        which: which of its sizes, counted round.
    """
    sizes = sorted({s for operand in operands_of(case) for s in operand.shape if s > 2})
    if not sizes:
        return None
    size = sizes[which % len(sizes)]

    def other(operand: Operand) -> Operand:
        return replace(operand, shape=tuple(0 if s == size else s for s in operand.shape))

    args, kwargs = _operands_replaced(case, other)
    return _program(replace(case, args=_zeroed(args, size), kwargs=_zeroed(kwargs, size)))


def _changed(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    def other(operand: Operand) -> Operand:
        return replace(operand, make=lambda shape: change(operand.make(shape)))

    args, kwargs = _operands_replaced(case, other)
    return replace(case, args=args, kwargs=kwargs)


def _operands_replaced(case: Case, change: Callable[[Operand], Operand]) -> Any:
    made: dict[Operand, Operand] = {}
    return map_operands(
        (case.args, case.kwargs), lambda o: made[o] if o in made else made.setdefault(o, change(o))
    )


def _zeroed(arg: Any, size: int) -> Any:
    if isinstance(arg, list | tuple):
        return type(arg)(_zeroed(a, size) for a in arg)
    if isinstance(arg, dict):
        return {key: _zeroed(value, size) for key, value in arg.items()}
    return 0 if type(arg) is int and arg == size else arg


def _program(case: Case) -> RuleProgram | None:
    """The program of a case; None if torch takes no such values, or gives another size than it says."""
    try:
        program = RuleProgram(case)
    except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
        return None
    said = [y.meta["val"].shape for y in program.unplaced.outputs()]  # type: ignore[attr-defined]
    return program if said == [y.shape for y in program.expected] else None

"""Python values in calls: each is a program of its own, unless a symbol can stand for all of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tpcompile.ir.calls import OpenNumber, leaf_names

from .program import RankProgram

MOST_VALUES = 8
"""So many programs are kept of calls that differ in nothing but python values."""


def open_numbers(programs: Sequence[RankProgram], bound: dict[str, Any], path: str) -> dict[str, Any]:
    """The call, with those numbers marked that had another value in an earlier one.

    Args:
        programs: the model's.
        bound: the call.
        path: the module that is called.
    """
    names = leaf_names(bound)
    earlier = [p for p in programs if p.entry == path and p.names == tuple(bound)]

    def changes(name: str) -> bool:
        others = (p.example[names.index(name)] for p in earlier if len(p.example) == len(names))
        return any(type(other) is int and other != bound[name] for other in others)

    # A size of 0 or 1 would be a program of its own, too; a number of more than 63 bits is none.
    plain = {n: v for n, v in bound.items() if type(v) is int and 1 < v <= sys.maxsize}
    numbers = [name for name in plain if changes(name)]
    return {**bound, **{name: OpenNumber(bound[name]) for name in numbers}}


def forget_values(programs: list[RankProgram], bound: dict[str, Any]) -> str | None:
    """Drops the oldest of the programs that differ from the last one in python values only, if they are many.

    The first program of all stays: it has decided where the weights are.

    Args:
        programs: the model's; the last one is new.
        bound: the call that it was captured for.

    Returns:
        What the user should know, if any were dropped.
    """
    kind = _kind(programs[-1])
    values = list(dict.fromkeys(_values(p) for p in programs[1:] if _kind(p) == kind))
    if len(values) <= MOST_VALUES:
        return None
    programs[1:] = [p for p in programs[1:] if _kind(p) != kind or _values(p) != values[0]]
    names = leaf_names(bound)
    names.append("attributes that forward reads")
    differ = [names[i] for i, each in enumerate(zip(*values, strict=True)) if len(set(each)) > 1]
    return (
        f"{', '.join(differ)} had more than {MOST_VALUES} values. Each of them is a program of its own, "
        "captured and compiled when it first comes; the oldest are dropped. Give what changes from call to "
        "call as a tensor: torch.tensor(value)"
    )


def _kind(program: RankProgram) -> Any:
    forms = tuple((x.dtype, x.ndim) if isinstance(x, Tensor) else type(x) for x in program.example)
    same = (program.entry, program.names, program.training, program.autocast, program.types)
    return (*same, program.numbers, forms, repr(program.captured.in_spec))


def _values(program: RankProgram) -> tuple[Any, ...]:
    """The python values of a program's call, and a number for those of the model."""
    return (*(None if isinstance(x, Tensor) else x for x in program.example), program.state)

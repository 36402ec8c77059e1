"""How one value is placed on one axis of the mesh: divided, whole, or as summands.

The notation is DTensor's: ``S(0)``, ``R``, ``P(sum)``. Two things are added: a dimension may be a
product of factors, major first (``(heads head_dim)``), and ``S(1/1)`` divides the second factor of
dimension 1. ``S(1)`` is ``S(1/0)``, an ordinary shard whose unit is whatever the minor factors span.
``S(1+)`` divides dimension 1 whatever its size is, in equal parts that are filled up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, TypeVar

from tpcompile.errors import TpCompileError

from .check import Must, check_arguments, well_called

REDUCTIONS = ("sum", "max", "min")
Reduction = Annotated[str, Must('"sum", "max" or "min"', lambda op: op in REDUCTIONS)]
T = TypeVar("T")


def _well_made(kind: type[T]) -> type[T]:
    """Refuses instances that are made with too many or too few arguments."""
    kind.__init__ = well_called(kind.__init__)  # type: ignore[method-assign]
    return kind


@_well_made
@dataclass(frozen=True, order=True)
class Replicate:
    """Every rank holds the whole value."""

    def __str__(self) -> str:
        return "R"


@_well_made
@dataclass(frozen=True, order=True)
class Shard:
    """Each rank holds a part of one factor of one dimension.

    Attributes:
        dim: the tensor dimension, counted from the front.
        factor: which factor of that dimension is divided, major first.
    """

    dim: int
    factor: Annotated[int, Must("the number of a factor", lambda number: number >= 0)] = 0

    def __post_init__(self) -> None:
        if type(self.dim) is not int or type(self.factor) is not int or self.factor < 0:  # many are made
            check_arguments(Shard, vars(self))

    def __str__(self) -> str:
        return f"S({self.dim})" if self.factor == 0 else f"S({self.dim}/{self.factor})"


@_well_made
@dataclass(frozen=True, order=True)
class Partial:
    """The value is the reduction (``sum``, ``max``, ``min``) of what the ranks hold."""

    op: Reduction = "sum"

    def __post_init__(self) -> None:
        if self.op not in REDUCTIONS:
            check_arguments(Partial, vars(self))

    def __str__(self) -> str:
        return f"P({self.op})"


@dataclass(frozen=True, order=True)
class Owned:
    """Every rank has all rows, but only those right whose expert it holds (see ``ownership.py``).

    Attributes:
        dim: the dimension of the rows.
        ids: the name of the value that says each row's expert.
        units: how many experts are divided.
    """

    dim: int
    ids: str
    units: int

    def __str__(self) -> str:
        return f"O({self.dim} of {self.units} by {self.ids})"


@dataclass(frozen=True, order=True)
class Filled:
    """A dimension of any size, divided in parts of ``ceil(size / ranks)`` positions, on all axes together.

    All ranks hold equally many, so that they run the same program, whatever the size. What the last ones
    have too much is filled up with copies of the last position, and cut off again when it is gathered.

    Attributes:
        dim: the dimension.
    """

    dim: int

    def __str__(self) -> str:
        return f"S({self.dim}+)"


Placement = Replicate | Shard | Partial | Owned | Filled
R = Replicate()
P = Partial()

_TEXT = re.compile(r"R|S\((\d+)(?:/(\d+))?\)|S\((\d+)\+\)|P\((sum|max|min)\)|O\((\d+) of (\d+) by (\w+)\)")


def parse_placement(text: str) -> Placement:
    """Reads what ``str`` of a placement prints.

    Raises:
        TpCompileError: the text is not a placement.
    """
    match = _TEXT.fullmatch(text)
    if match is None:
        raise TpCompileError(
            f"{text!r} is not a placement",
            where="placement",
            todo="write R, S(dim), S(dim/factor), S(dim+) or P(sum)",
        )
    if text == "R":
        return R
    if text.endswith("+)"):
        return Filled(int(match[3]))
    if text.startswith("S"):
        return Shard(int(match[1]), int(match[2] or 0))
    if text.startswith("O"):
        return Owned(int(match[5]), match[7], int(match[6]))
    return Partial(match[4])


def split_evenly(units: int, ranks: int) -> tuple[int, ...]:
    """Sizes of the parts when ``units`` are divided over ``ranks``: the first ones get one more.

    The largest part is ``ceil(units / ranks)``; with fewer units than ranks the last parts are empty.
    """
    base, extra = divmod(units, ranks)
    return tuple(base + 1 if r < extra else base for r in range(ranks))

"""The types of ``verify_placements``: a value on one sub-axis, and what markers make of it.

``R`` comes in two kinds, which differ in the gradient: every rank has all of it, or a summand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tpcompile.ir import markers
from tpcompile.ir.placements import Filled, P, Partial, Placement, R, Shard
from tpcompile.rules.choices import Choice

WHOLE, SUMMAND, NONE = "whole", "summand", "none"
"""What a rank has of the gradient of a replicated value: all of it, a summand, or there is none."""


@dataclass(frozen=True)
class Type:
    """A value on one sub-axis.

    Attributes:
        placement: how the value is placed.
        gradient: what each rank has of its gradient, if the value is replicated. The gradient of a sharded
            value is sharded alike, that of a partial one is whole: it needs no saying.
    """

    placement: Placement
    gradient: str = NONE

    def __str__(self) -> str:
        summand = self.placement == R and self.gradient == SUMMAND
        return f"{self.placement} (gradient {P})" if summand else str(self.placement)


Types = tuple[Type, ...]


class Unproved(Exception):
    """Why a node has no type: what was expected, and what was found."""


@dataclass(frozen=True)
class Move:
    """What a marker does on its sub-axes.

    Attributes:
        src: the placement that it takes.
        dst: the placement that it leaves.
        takes: what ranks must have of the gradient of what it takes; "" if anything will do.
        leaves: what they have of that of the outcome.
    """

    src: Placement
    dst: Placement
    takes: str = ""
    leaves: str = WHOLE


MOVES: dict[Callable[..., Any], Callable[..., Move]] = {
    markers.all_reduce: lambda op: Move(Partial(op), R),
    markers.all_gather: lambda place, size=None, partial=False: Move(
        place, R, leaves=SUMMAND if partial else WHOLE
    ),
    markers.reduce_scatter: lambda place: Move(P, place),
    markers.all_to_all: lambda src, dst: Move(src, dst),
    markers.take_shard: lambda place: Move(R, place, takes=WHOLE),
    markers.keep_first: lambda: Move(R, P, takes=WHOLE),
    markers.pad_shard: lambda place, size=None: Move(place, P),
    markers.copy_to_ranks: lambda: Move(R, R, takes=WHOLE, leaves=SUMMAND),
    markers.gradient_once: lambda: Move(R, R, takes=SUMMAND),
    markers.mask_rows: lambda place, ids: Move(place, P),
}


def refuse_disorder(axes: markers.Axes, now: Sequence[Placement], move: Move) -> None:
    """Sub-axes that divide one factor do so one after the other: only the innermost may come or go.

    Raises:
        Unproved: they do not.
    """
    if not axes or list(axes) != sorted(set(axes)) or not all(0 <= a < len(now) for a in axes):
        raise Unproved(f"{axes} are not sub-axes, in order, of {len(now)}")
    for place in (move.src, move.dst):
        inside = [a for a, p in enumerate(now) if p == place and a > axes[0] and a not in axes]
        if isinstance(place, Shard | Filled) and inside:
            raise Unproved(f"sub-axis {inside[0]} divides {place} further inside")


def filled(choice: Choice) -> Choice:
    """The same for a dimension of any size, whose parts are filled up."""

    def fill(placements: tuple[Placement, ...]) -> tuple[Placement, ...]:
        return tuple(Filled(p.dim) if isinstance(p, Shard) else p for p in placements)

    return replace(choice, inputs=fill(choice.inputs), outputs=fill(choice.outputs))

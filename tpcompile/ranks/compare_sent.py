"""Finds out that the programs of ranks would not send the same, before they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch.distributed as dist

from tpcompile.errors import TpCompileError

from .exchange import exchange, name_of


@dataclass(frozen=True)
class Sent:
    """A collective of a rank's program.

    Attributes:
        kind: what it is, and over how many ranks; the same on all ranks of the axis.
        members: these ranks.
        facts: sizes and options that all of them must have.
    """

    kind: str
    members: tuple[int, ...]
    facts: str


def compare_sent(group: dist.ProcessGroup | None, sent: Sequence[Sent]) -> None:
    """Compares the collectives of a program over the ranks: kinds, groups, order, sizes.

    Ranks that are in no collective together, because they are on other sub-axes, may have other sizes.

    Raises:
        TpCompileError: on all ranks, with the first collective that differs.
    """
    if group is None or group.size() == 1:
        return
    everyone = exchange(group, "compare what programs send", list(sent))
    refuse_unlike(everyone, lambda place: name_of(group, place))


def refuse_unlike(everyone: Sequence[Sequence[Sent]], name: Callable[[int], str] = "rank {}".format) -> None:
    """Refuses programs that would not send the same.

    Args:
        everyone: what every rank's program sends.
        name: what a rank is called.

    Raises:
        TpCompileError: with the first collective that differs.
    """
    nothing = Sent("nothing more", (), "")
    first: dict[tuple[int, ...], tuple[int, Sent]] = {}
    for i in range(max(map(len, everyone))):
        first.clear()
        for place, theirs in enumerate(everyone):
            mine = theirs[i] if i < len(theirs) else nothing
            other, reference = first.setdefault(mine.members, (place, mine))
            if mine != reference:
                _refuse(i, (other, reference), (place, mine), name)
            other, reference = next(iter(first.values()))
            if mine.kind != reference.kind:
                _refuse(i, (other, reference), (place, mine), name)


def _refuse(i: int, one: tuple[int, Sent], two: tuple[int, Sent], name: Callable[[int], str]) -> NoReturn:
    told = [f"{name(place)} {sent.kind} {sent.facts}".rstrip() for place, sent in (one, two)]
    raise TpCompileError(
        f"the ranks' programs send different things: {told[0]}, {told[1]}",
        where=f"collective {i + 1} of the program",
        todo="give every rank the same model, rules, passes and versions of what they are made of",
    )

"""A small layered layout: boxes in rows from top to bottom, edges through free places between them."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)

_SWEEPS = 12
_SPACE = 22.0
_THIN = 10.0
"""What an edge takes where it passes a row."""


@dataclass
class Layout(Generic[T]):
    """Where things are.

    Attributes:
        centre: of each box, the middle of its width.
        row: of each box.
        paths: per edge, the middles that it passes, in each row from its source to its target.
        width: of everything.
        rows: how many there are.
    """

    centre: dict[T, float] = field(default_factory=dict)
    row: dict[T, int] = field(default_factory=dict)
    paths: dict[tuple[T, T], list[float]] = field(default_factory=dict)
    width: float = 0.0
    rows: int = 0


def lay_out(widths: Mapping[T, float], edges: Sequence[tuple[T, T]]) -> Layout[T]:
    """Places boxes of a graph without circles.

    Args:
        widths: per box, its width; in an order that edges follow, except for sources, which may be anywhere.
        edges: from source to target, each once.
    """
    row = _rows(list(widths), edges)
    count = max(row.values(), default=-1) + 1
    # An edge over several rows has a place in each of them.
    places: list[list[Hashable]] = [[] for _ in range(count)]
    wide: dict[Hashable, float] = {}
    links: list[tuple[Hashable, Hashable]] = []
    for box, at in row.items():
        places[at].append(box)
        wide[box] = widths[box]
    through: dict[tuple[T, T], list[Hashable]] = {}
    for source, target in edges:
        passed: list[Hashable] = [(source, target, at) for at in range(row[source] + 1, row[target])]
        for at, place in enumerate(passed, row[source] + 1):
            places[at].append(place)
            wide[place] = _THIN
        chain = [source, *passed, target]
        through[source, target] = chain
        links += itertools.pairwise(chain)
    centre = _columns(places, wide, links)
    found = Layout[T](rows=count, row=row)
    found.centre = {box: centre[box] for box in widths}
    found.paths = {edge: [centre[place] for place in chain] for edge, chain in through.items()}
    found.width = max((centre[p] + wide[p] / 2 for p in wide), default=0.0)
    return found


def _rows(boxes: Sequence[T], edges: Sequence[tuple[T, T]]) -> dict[T, int]:
    """As far down as what needs a box allows, so that edges are short; results right below their boxes."""
    before: dict[T, list[T]] = {box: [] for box in boxes}
    after: dict[T, list[T]] = {box: [] for box in boxes}
    for source, target in edges:
        before[target].append(source)
        after[source].append(target)
    row: dict[T, int] = {}

    def depth(box: T) -> int:
        if box not in row:
            row[box] = 1 + max(map(depth, before[box]), default=-1)
        return row[box]

    for box in boxes:
        depth(box)
    for box in sorted(boxes, key=row.__getitem__, reverse=True):
        if after[box]:
            row[box] = min(row[other] for other in after[box]) - 1
    return row


def _columns(
    places: list[list[Hashable]], wide: Mapping[Hashable, float], links: Sequence[tuple[Hashable, Hashable]]
) -> dict[Hashable, float]:
    """Middles: every place near those that it is linked with, in rows that do not overlap."""
    above: dict[Hashable, list[Hashable]] = {}
    below: dict[Hashable, list[Hashable]] = {}
    for source, target in links:
        below.setdefault(source, []).append(target)
        above.setdefault(target, []).append(source)
    centre: dict[Hashable, float] = {}
    for row in places:
        _spread(row, dict.fromkeys(row, 0.0), wide, centre)
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        for row in places if down else reversed(places):
            near = above if down else below
            wanted = {p: _mean([centre[o] for o in near.get(p, ())], centre[p]) for p in row}
            row.sort(key=lambda place: wanted[place])
            _spread(row, wanted, wide, centre)
    for row in places:  # at last, between both
        every = {p: [centre[o] for o in (*above.get(p, ()), *below.get(p, ()))] for p in row}
        _spread(row, {p: _mean(every[p], centre[p]) for p in row}, wide, centre)
    left = min((centre[p] - wide[p] / 2 for p in centre), default=0.0)
    return {place: at - left for place, at in centre.items()}


def _spread(
    row: Sequence[Hashable],
    wanted: Mapping[Hashable, float],
    wide: Mapping[Hashable, float],
    centre: dict[Hashable, float],
) -> None:
    """Puts a row where it is wanted, in its order, moved apart where it would overlap."""
    groups: list[tuple[float, float, list[Hashable]]] = []  # from, to, which
    for place in row:
        half = wide[place] / 2
        groups.append((wanted[place] - half, wanted[place] + half, [place]))
        while len(groups) > 1 and groups[-2][1] + _SPACE > groups[-1][0]:
            (a, b, one), (c, d, two) = groups[-2:]
            length = (b - a) + _SPACE + (d - c)
            middle = ((a + b) / 2 * len(one) + (c + d) / 2 * len(two)) / (len(one) + len(two))
            groups[-2:] = [(middle - length / 2, middle + length / 2, [*one, *two])]
    for start, _, members in groups:
        for place in members:
            centre[place] = start + wide[place] / 2
            start += wide[place] + _SPACE


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise

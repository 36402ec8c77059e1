"""Draws how a parameter is divided, as SVG that reads on light and dark paper."""

from __future__ import annotations

import hashlib

from tpcompile.ir.units import ranks_named, ranks_text

from .markup import Markup, join, tag
from .partition import Cell, Partition

# Perceived lightness grows evenly along these, whatever colours an eye tells apart (after viridis).
_RAMP = ("#453781", "#39568c", "#2d708e", "#238a8d", "#20a387", "#3cbc75", "#74d055", "#b8de29")
_GREY = "#8b929c"
_MOST_STRIPES = 4
_LETTER = 6.6  # pixels that a character of a label takes


def rank_colour(rank: int, ranks: int) -> str:
    """The colour of a rank: dark for the first, light for the last."""
    at = rank / max(ranks - 1, 1) * (len(_RAMP) - 1)
    low = min(int(at), len(_RAMP) - 2)
    one, two = _channels(_RAMP[low]), _channels(_RAMP[low + 1])
    mixed = (round(a + (b - a) * (at - low)) for a, b in zip(one, two, strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def draw_partition(partition: Partition, width: float, height: float) -> Markup:
    """The whole parameter as a rectangle, in the colours of the ranks that hold its parts.

    What every rank holds is grey; what some hold together has stripes in their colours.

    Args:
        partition: who holds what.
        width: in pixels, and
        height: in pixels; the rectangle is not to scale, its parts are.
    """
    return _frame(partition, width, height, _drawn(partition, width, height, labels=False))


class Drawings:
    """The drawings of a page, each of which is there once, however many parameters look like it."""

    def __init__(self) -> None:
        self._names: dict[Markup, str] = {}

    def draw(self, partition: Partition, width: float, height: float, *, labels: bool = False) -> Markup:
        """As ``draw_partition``; the page has to have ``all``, too.

        Args:
            partition: who holds what.
            width: in pixels, and
            height: in pixels.
            labels: write the ranks into the parts that have room for it.
        """
        drawn = _drawn(partition, width, height, labels=labels)
        name = self._names.setdefault(drawn, f"drawing-{len(self._names)}")
        return _frame(partition, width, height, tag("use", href=f"#{name}"))

    def all(self) -> Markup:
        """What is drawn, not to be seen where it stands."""
        drawn = [tag("g", markup, id=name) for markup, name in self._names.items()]
        return tag("svg", tag("defs", *drawn), width=0, height=0, aria_hidden="true", class_="drawings")


def _frame(partition: Partition, width: float, height: float, inside: Markup) -> Markup:
    return tag(
        "svg",
        inside,
        viewBox=f"0 0 {_n(width)} {_n(height)}",
        width=_n(width),
        height=_n(height),
        role="img",
        aria_label=describe(partition),
        class_="tpc-partition",
    )


def _drawn(partition: Partition, width: float, height: float, *, labels: bool) -> Markup:
    across, down = width / max(partition.size[1], 1), height / max(partition.size[0], 1)
    paths: dict[tuple[int, ...], list[str]] = {}
    texts = []
    for cell in partition.cells:
        left, right = (at * across for at in cell.columns)
        top, bottom = (at * down for at in cell.rows)
        paths.setdefault(cell.ranks, []).append(f"M{_n(left)} {_n(top)}H{_n(right)}V{_n(bottom)}H{_n(left)}z")
        if labels:
            texts += _label(cell, partition, (left, top, right, bottom))
    fills = {ranks: _fill(ranks, partition.ranks) for ranks in paths}
    patterns = [pattern for _, pattern in fills.values() if pattern]
    shapes = [
        tag("path", tag("title", _title(ranks, partition.ranks)), d="".join(d), fill=fills[ranks][0])
        for ranks, d in paths.items()
    ]
    borders = "".join(f"M0 {_n(y * down)}H{_n(width)}" for y in partition.rows)
    borders += "".join(f"M{_n(x * across)} 0V{_n(height)}" for x in partition.columns)
    return join(
        tag("defs", *patterns) if patterns else "",
        tag("g", *shapes, stroke="#fff", stroke_opacity=0.55, stroke_width=0.75 if labels else 0.4),
        _borders(borders, labels) if borders else "",
        *texts,
    )


def describe(partition: Partition) -> str:
    """A partition in a sentence."""
    if partition.ranks == 1:
        return "held by the only rank"
    if all(len(cell.ranks) == partition.ranks for cell in partition.cells):
        return "whole on every rank"
    holders = {cell.ranks for cell in partition.cells}
    shared = max(map(len, holders))
    more = f", each held by up to {shared} ranks" if shared > 1 else ""
    cut = "" if partition.drawn == partition.ranks else f"; the first {partition.drawn} ranks are drawn"
    return f"{len(partition.cells)} parts{more}{cut}"


def _borders(path: str, labels: bool) -> Markup:
    outer, inner = (4, 1.5) if labels else (1.8, 0.7)
    return join(
        tag("path", d=path, stroke="#fff", stroke_width=outer, fill="none"),
        tag("path", d=path, stroke="#111", stroke_width=inner, fill="none"),
    )


def _title(ranks: tuple[int, ...], every: int) -> str:
    if len(ranks) == every:
        return "every rank" if every > 1 else "rank 0"
    return ranks_named(ranks)


def _label(cell: Cell, partition: Partition, box: tuple[float, float, float, float]) -> list[Markup]:
    left, top, right, bottom = box
    text = _title(cell.ranks, partition.ranks)
    if len(text) * _LETTER > right - left:
        text = ranks_text(cell.ranks)
    if len(text) * _LETTER > right - left or bottom - top < 13:
        return []
    dark = cell.ranks[-1] < 0.55 * partition.ranks or len(cell.ranks) > 1
    paint = {"fill": "currentColor"} if len(cell.ranks) == partition.ranks else {}
    paint = paint or {"fill": "#fff", "stroke": "#0007"} if dark else {"fill": "#0b1b1b", "stroke": "none"}
    middle = (left + right) / 2, (top + bottom) / 2 + 4
    return [
        tag(
            "text",
            text,
            x=middle[0],
            y=middle[1],
            text_anchor="middle",
            font_size=11,
            stroke_width=2.5,
            paint_order="stroke",
            **paint,
        )
    ]


def _fill(ranks: tuple[int, ...], every: int) -> tuple[str, Markup | None]:
    """A colour, or stripes: with the pattern, whose name says what it is, as pages may have it twice."""
    if len(ranks) == every:
        return f"{_GREY}55", None
    if len(ranks) == 1:
        return rank_colour(ranks[0], every), None
    colours = [rank_colour(rank, every) for rank in ranks[:_MOST_STRIPES]]
    name = "tpc" + hashlib.sha1("".join(colours).encode()).hexdigest()[:8]
    stripes = [tag("rect", x=6 * i, width=6, height=6, fill=c) for i, c in enumerate(colours)]
    pattern = tag(
        "pattern",
        *stripes,
        id=name,
        width=6 * len(colours),
        height=6,
        patternUnits="userSpaceOnUse",
        patternTransform="rotate(45)",
    )
    return f"url(#{name})", pattern


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")

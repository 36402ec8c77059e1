"""The predicted time of a forward, drawn and in numbers."""

from __future__ import annotations

from collections.abc import Sequence

from tpcompile.ir.units import time_text

from .markup import Markup, join, table_head, tag
from .timeline import LANES, Stretch

WIDTH, LANE, TOP = 1000.0, 26.0, 30.0
_GAP = 14.0
_LEAST = 0.6
"""Pixels that anything is wide, so that it is seen."""


def timeline_section(stretches: Sequence[Stretch], seconds: float, cost: str) -> Markup:
    """The section.

    Args:
        stretches: what a forward does.
        seconds: its modelled time, which may have more than the stretches say (a divided sequence).
        cost: the name of the cost model.
    """
    rest = seconds - sum(stretch.seconds() for stretch in stretches)
    beside = f" {_time(rest)} of it, for what a divided sequence sends, is not drawn." if rest > 1e-7 else ""
    lead = (
        f"Predicted, not measured: what one rank does in a forward of the example, as the cost model {cost} "
        f"sees it, one thing after the other. Layers that do the same are drawn once.{beside}"
    )
    legend = [join(tag("i", class_=f"lane-{lane}"), text) for lane, text in LANES.items()]
    return tag(
        "section",
        tag("h2", "A step, predicted"),
        tag("p", lead, class_="lead"),
        tag("p", *(tag("span", each) for each in legend), class_="legend"),
        tag("div", draw_timeline(stretches), class_="wide", tabindex=0, role="group", aria_label="Timeline"),
        _table(stretches),
        id="step",
    )


def draw_timeline(stretches: Sequence[Stretch]) -> Markup:
    """Three lanes against time; a stretch of many layers is as wide as one of them."""
    length = sum(e.seconds for s in stretches for e in s.events) or 1.0
    scale = (WIDTH - _GAP * (len(stretches) - 1)) / length
    x, parts = 0.0, []
    for stretch in stretches:
        width = scale * sum(e.seconds for e in stretch.events)
        parts.append(_draw_stretch(stretch, x, width, scale))
        x += width + _GAP
    height = TOP + LANE * len(LANES) + 4
    lines = [
        tag("path", d=f"M0 {TOP + LANE * i + LANE - 3:.0f}H{WIDTH:.0f}", class_="rule")
        for i in range(len(LANES))
    ]
    return tag(
        "svg",
        *lines,
        *parts,
        viewBox=f"0 0 {WIDTH:.0f} {height:.0f}",
        class_="timeline",
        role="img",
        aria_label="The predicted forward against time; the table below has the numbers",
    )


def _draw_stretch(stretch: Stretch, x: float, width: float, scale: float) -> Markup:
    name = stretch.name + (f" × {stretch.times}" if stretch.times > 1 else "")
    bottom = TOP + LANE * len(LANES)
    parts = []
    if name:
        many = stretch.times > 1
        parts.append(
            tag("rect", x=x - 4, y=2, width=width + 8, height=bottom, rx=5, class_="many" if many else "one")
        )
        if width > 7 * len(name):
            parts.append(tag("text", name, x=x + 4, y=18))
    lanes = list(LANES)
    for event in stretch.events:
        drawn = max(event.seconds * scale, 0.0)
        y = TOP + LANE * lanes.index(event.lane)
        title = f"{event.where or '(top)'}: {event.what}, {_time(event.seconds)}"
        if drawn >= _LEAST / 4:
            parts.append(
                tag(
                    "rect",
                    tag("title", title),
                    x=x,
                    y=y,
                    width=max(drawn, _LEAST),
                    height=LANE - 6,
                    class_=f"lane-{event.lane}",
                )
            )
        x += drawn
    return tag("g", tag("title", name or "outside of the layers"), *parts)


def _table(stretches: Sequence[Stretch]) -> Markup:
    head = table_head(("part",), (*LANES.values(), "together"))
    rows = []
    for stretch in stretches:
        name = stretch.name or _outside(stretch)
        times = f" × {stretch.times}" if stretch.times > 1 else ""
        cells = [_time(stretch.seconds(lane)) for lane in (*LANES, "")]
        rows.append(
            tag(
                "tr",
                tag("td", tag("code", name), times),
                *(tag("td", text, class_="number") for text in cells),
            )
        )
    whole = [_time(sum(s.seconds(lane) for s in stretches)) for lane in (*LANES, "")]
    foot = tag("tr", tag("th", "all", scope="row"), *(tag("td", text, class_="number") for text in whole))
    return tag("table", head, tag("tbody", *rows), tag("tfoot", foot), class_="step")


def _outside(stretch: Stretch) -> str:
    """Where most of the time of a stretch goes that is not a layer."""
    longest = max(stretch.events, key=lambda event: event.seconds * event.times)
    return longest.where.removesuffix(".weight") or "(top)"


def _time(seconds: float) -> str:
    return time_text(seconds) if seconds >= 1e-3 else f"{seconds * 1e6:.1f} \N{MICRO SIGN}s"

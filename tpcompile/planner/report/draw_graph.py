"""Draws a program, or a layer of it, as SVG that reads on light and dark paper."""

from __future__ import annotations

import itertools

from .graph_boxes import Box, Boxes
from .graph_layout import lay_out
from .markup import Markup, tag

_LETTER, _HIGH, _ROW, _LONGEST = 6.4, 38.0, 80.0, 40
_SOFT = "#808a94"
_LINES = {"S": "#3b8ea5", "P": "#d9822b", "O": "#8a63b8", "R": _SOFT}
# Fill, and line.
_KINDS = {
    "matmul": ("#3b8ea52e", "#3b8ea5"),
    "collective": ("#d9822b3d", "#d9822b"),
    "marker": ("none", "#d9822b"),
    "other": ("none", _SOFT),
    "given": ("none", "none"),
    "result": ("none", "none"),
}


def draw_graph(boxes: Boxes) -> Markup:
    """Matmuls are blue, collectives orange; edges have the placements of the values."""
    lines = {box: _lines(box) for box in boxes.boxes}
    widths = {box: 20 + _LETTER * max(map(len, texts)) for box, texts in lines.items()}
    layout = lay_out(widths, list(boxes.edges))
    labels: list[Markup] = []
    paths: list[Markup] = []
    for (source, target), placements in boxes.edges.items():
        points = layout.paths[source, target]
        rows = range(layout.row[source], layout.row[target] + 1)
        text = ", ".join(placements)
        colour = _LINES.get(text[0], _SOFT)
        start = (points[0], layout.row[source] * _ROW + _HIGH)
        d = f"M{start[0]:.0f} {start[1]:.0f}" + _curve(points, rows)
        paths.append(tag("path", tag("title", text), d=d, stroke=colour, stroke_dasharray=_dashes(text)))
        labels.append(_label(text, (points[0] + points[1]) / 2, start[1] + (_ROW - _HIGH) / 2 + 4, colour))
    drawn = [_box(box, lines[box], layout.centre[box], layout.row[box] * _ROW, widths[box]) for box in lines]
    width, height = layout.width + 16, max(layout.rows, 1) * _ROW - _ROW + _HIGH + 8
    return tag(
        "svg",
        tag(
            "g",
            tag("g", *paths, fill="none", stroke_width=1.3),
            *drawn,
            *labels,
            transform="translate(8 4)",
            font_family="system-ui, sans-serif",
            font_size=12,
        ),
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        height=f"{height:.0f}",
        role="img",
        aria_label=f"The graph of {boxes.name or 'the program'}: {len(boxes.boxes)} boxes",
        class_="tpc-graph",
    )


def _lines(box: Box) -> list[str]:
    texts = [box.label, box.text] if box.text and box.text != box.label else [box.label or box.text]
    return [t if len(t) <= _LONGEST else t[: _LONGEST - 1] + "…" for t in texts if t] or [""]


def _curve(points: list[float], rows: range) -> str:
    """From row to row, straight where it passes one."""
    parts = []
    for (x0, x1), row in zip(itertools.pairwise(points), rows, strict=False):
        top, bottom = row * _ROW + _HIGH, (row + 1) * _ROW
        middle = (top + bottom) / 2
        parts.append(f"C{x0:.0f} {middle:.0f} {x1:.0f} {middle:.0f} {x1:.0f} {bottom:.0f}")
        if row + 1 != rows[-1]:
            parts.append(f"V{bottom + _HIGH:.0f}")
    return "".join(parts)


def _dashes(placement: str) -> str | None:
    """A sum that is not complete is not a whole line either."""
    return "5 3" if "P(" in placement else None


def _label(text: str, x: float, y: float, colour: str) -> Markup:
    style = "paint-order:stroke;stroke:var(--paper,transparent);stroke-width:4px"
    return tag(
        "text",
        text,
        x=f"{x:.0f}",
        y=f"{y:.0f}",
        text_anchor="middle",
        font_size=10.5,
        fill=colour,
        style=style,
    )


def _box(box: Box, lines: list[str], centre: float, top: float, width: float) -> Markup:
    fill, line = _KINDS[box.kind]
    names = ", ".join(node.name for node in box.nodes[:12]) + (" …" if len(box.nodes) > 12 else "")
    texts = []
    for number, text in enumerate(lines):
        y = top + (23 if len(lines) == 1 else 16 + 14 * number)
        soft = number or box.kind in ("given", "result")
        texts.append(
            tag(
                "text",
                text,
                x=f"{centre:.0f}",
                y=f"{y:.0f}",
                text_anchor="middle",
                fill=_SOFT if soft else "currentColor",
                font_size=10.5 if number else 12,
            )
        )
    shape = tag(
        "rect",
        x=f"{centre - width / 2:.0f}",
        y=f"{top:.0f}",
        width=f"{width:.0f}",
        height=f"{_HIGH:.0f}",
        rx=_HIGH / 2 if box.kind in ("collective", "marker") else 6,
        fill=fill,
        stroke=line,
        stroke_dasharray="3 3" if box.kind == "marker" else None,
    )
    return tag("g", tag("title", names), shape, *texts, class_=f"tpc-{box.kind}")

"""The rewritten graph of one layer of each kind."""

from __future__ import annotations

from collections.abc import Sequence

from .draw_graph import draw_graph
from .graph_boxes import Boxes
from .markup import Markup, tag

MOST_BOXES, MOST_LISTS = 120, 6


def graph_section(found: Sequence[Boxes]) -> Markup:
    """The section: a drawing for each of the first lists of layers, if it is not too large for one."""
    parts = []
    for boxes in found[:MOST_LISTS]:
        title = tag("h3", tag("code", boxes.name or "the program"))
        if len(boxes.boxes) > MOST_BOXES:
            parts += [title, tag("p", f"{len(boxes.boxes)} boxes are too many for a drawing.", class_="lead")]
        else:
            name = f"Graph of {boxes.name}"
            parts += [
                title,
                tag("div", draw_graph(boxes), class_="wide", tabindex=0, role="group", aria_label=name),
            ]
    if len(found) > MOST_LISTS:
        parts.append(
            tag("p", f"{len(found) - MOST_LISTS} more lists of layers are not drawn.", class_="lead")
        )
    return tag(
        "section",
        tag("h2", "Layers after rewriting"),
        tag(
            "p",
            "Of each list of layers the last that was captured, which stands for all that are like it. "
            "Matmuls are blue, collectives orange; an edge has the placement of the value on its way, and is "
            "dashed where it is a sum that is not complete. All that is between them is drawn as one. Dashed "
            "boxes change a placement and send nothing, or in backward only.",
            class_="lead",
        ),
        *parts,
        id="graph",
    )

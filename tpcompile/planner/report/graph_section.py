"""The rewritten graph of one layer of each kind."""

from __future__ import annotations

from tpcompile.ir.units import ranks_text
from tpcompile.planner.global_program import GlobalProgram

from .draw_graph import draw_graph
from .graph_boxes import boxes_of
from .layer_kinds import LayerKind, kinds_of
from .markup import Markup, join, tag

MOST_BOXES, MOST_KINDS = 120, 8


def graph_section(program: GlobalProgram) -> Markup:
    """The section: a drawing of a layer of each of the first kinds, if it is not too large for one."""
    found = kinds_of(program)
    parts = [part for kind in found[:MOST_KINDS] for part in _drawn(program, kind)]
    if len(found) > MOST_KINDS:
        more = f"{len(found) - MOST_KINDS} more kinds of layers are not drawn."
        parts.append(tag("p", more, class_="lead"))
    return tag(
        "section",
        tag("h2", "Layers after rewriting"),
        tag(
            "p",
            "Of each list of layers one of every kind, the last that was captured. "
            "Matmuls are blue, collectives orange; an edge has the placement of the value on its way, and is "
            "dashed where it is a sum that is not complete. All that is between them is drawn as one. Dashed "
            "boxes change a placement and send nothing, or in backward only.",
            class_="lead",
        ),
        *parts,
        id="graph",
    )


def _drawn(program: GlobalProgram, kind: LayerKind) -> tuple[Markup, Markup]:
    boxes = boxes_of(program, kind.name, kind.nodes)
    title = tag("code", kind.name or "the program")
    if len(kind.numbers) > 1:
        title = join(title, f", as all of {ranks_text(tuple(sorted(kind.numbers)))}")
    if len(boxes.boxes) > MOST_BOXES:
        text = f"{len(boxes.boxes)} boxes are too many for a drawing."
        return tag("h3", title), tag("p", text, class_="lead")
    name = f"Graph of {boxes.name}"
    drawing = tag("div", draw_graph(boxes), class_="wide", tabindex=0, role="group", aria_label=name)
    return tag("h3", title), drawing

"""A plan, or the graph of a program, as a notebook shows it: short, in the drawings of the report."""

from __future__ import annotations

from tpcompile.ir.units import size_text, time_text
from tpcompile.planner.compare_plans import outcome_of
from tpcompile.planner.diff_plans import plan_title
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.planner.plan_data import PlanData
from tpcompile.planner.print_plan import placement_text

from .draw_graph import draw_graph
from .draw_partition import draw_partition
from .graph_boxes import boxes_of
from .graph_section import MOST_BOXES
from .layer_kinds import kinds_of
from .markup import tag
from .partition import partition_of
from .tree import tree_of

MOST_WEIGHTS = 24
_SOFT = "color:#808a94"


def plan_html(plan: PlanData, name: str = "") -> str:
    """The head line of a plan and a table of its weights.

    Args:
        plan: the plan.
        name: of the model.
    """
    layout = plan.layout
    weights = list(tree_of(layout.params).every_weight())
    outcome = outcome_of(plan)
    head = (
        f"{size_text(plan.model_bytes)} of weights, {size_text(outcome.held)} on the fullest rank; "
        f"{outcome.collectives} collectives and {time_text(outcome.seconds)} a forward, "
        f"as modelled ({plan.cost.name})"
    )
    rows = []
    for weight in weights[:MOST_WEIGHTS]:
        partition = partition_of(layout, weight.name)
        drawn = "" if partition is None else draw_partition(partition, 64, 18)
        times = f" × {weight.count}" if weight.count > 1 else ""
        cells = (drawn, tag("code", weight.path), times, tag("code", placement_text(weight.layout)))
        size = size_text(layout.local_bytes(weight.name, 0))
        rows.append(tag("tr", *(tag("td", c, style="text-align:left") for c in cells), tag("td", size)))
    more = len(weights) - MOST_WEIGHTS
    last = [tag("p", f"and {more} more; plan.report(path) shows all", style=_SOFT)] if more > 0 else []
    title = f"{name} on {plan_title(plan)}" if name else f"Plan for {plan_title(plan)}"
    return tag("div", tag("b", title), tag("p", head, style=_SOFT), tag("table", *rows), *last)


def graph_html(program: GlobalProgram) -> str:
    """The last kind of layer of a rewritten program, drawn, if it is not too large for that."""
    kind = kinds_of(program)[-1]
    boxes = boxes_of(program, kind.name, kind.nodes)
    count = program.call_count()
    of = f"{kind.name}, {len(kind.nodes)} of {count} calls" if kind.name else f"{count} calls"
    many = len(boxes.boxes) > MOST_BOXES
    drawn = tag("p", "too many for a drawing", style=_SOFT) if many else draw_graph(boxes)
    return tag("div", tag("p", tag("code", of)), tag("div", drawn, style="overflow-x:auto"))

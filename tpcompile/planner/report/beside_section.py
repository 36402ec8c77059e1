"""Two plans side by side."""

from __future__ import annotations

from collections.abc import Callable

from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.units import size_text, time_text
from tpcompile.planner.compare_plans import Outcome, outcome_of
from tpcompile.planner.diff_plans import Change, changes, communicated, plan_title
from tpcompile.planner.plan_data import PlanData

from .draw_partition import draw_partition
from .markup import Markup, table_head, tag
from .partition import partition_of

_FIGURES: tuple[tuple[str, Callable[[Outcome], str]], ...] = (
    ("on the fullest rank", lambda outcome: size_text(outcome.held)),
    ("collectives in a forward", lambda outcome: str(outcome.collectives)),
    ("bytes that they carry", lambda outcome: size_text(outcome.moved)),
    ("predicted time", lambda outcome: time_text(outcome.seconds)),
)


def beside_section(one: PlanData, other: PlanData) -> Markup:
    """The section: what both cost, and the weights and collectives that differ."""
    titles = (f"this plan: {plan_title(one)}", f"the other: {plan_title(other)}")
    outcomes = outcome_of(one), outcome_of(other)
    figures = [
        tag(
            "tr", tag("th", name, scope="row"), *(tag("td", text(each), class_="number") for each in outcomes)
        )
        for name, text in _FIGURES
    ]
    costs = tag(
        "tr",
        tag("th", "cost model", scope="row"),
        *(tag("td", p.cost.name, class_="number") for p in (one, other)),
    )
    weights = [_row(one.layout, other.layout, change) for change in changes(one.layout, other.layout)]
    moved = [
        tag("tr", tag("td", "this" if sign == "-" else "the other"), tag("td", tag("code", line)))
        for sign, line in communicated(one, other)
    ]
    return tag(
        "section",
        tag("h2", "Beside another plan"),
        _table(table_head(("",), titles), [*figures, costs]),
        tag("h3", "Weights that differ"),
        _table(table_head(("weight", *titles)), weights)
        if weights
        else tag("p", "None: every weight is held the same."),
        tag("h3", "Collectives of one of them only"),
        tag("table", tag("tbody", *moved)) if moved else tag("p", "None: the same is communicated."),
        id="beside",
    )


def _table(head: Markup, rows: list[Markup]) -> Markup:
    return tag("table", head, tag("tbody", *rows), class_="beside")


def _row(one: WeightLayout, other: WeightLayout, change: Change) -> Markup:
    times = f" × {change.count}" if change.count > 1 else ""
    cells = [tag("td", tag("code", change.path), times)]
    for layout, text in ((one, change.one), (other, change.other)):
        partition = partition_of(layout, change.name) if text else None
        drawn = draw_partition(partition, 84, 26) if partition is not None else ""
        cells.append(tag("td", drawn, tag("code", text or "not there")))
    return tag("tr", *cells)

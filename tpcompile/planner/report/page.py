"""One page that shows a plan: no network, no framework."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files

from tpcompile.ir.units import size_text, time_text
from tpcompile.planner.compare_plans import outcome_of
from tpcompile.planner.explain import Explanation, explanations
from tpcompile.planner.plan_data import PlanData
from tpcompile.planner.print_plan import idle_lines, placement_text

from .bars import memory_section
from .beside_section import beside_section
from .graph_section import graph_section
from .markup import Markup, data, join, table_head, tag
from .timeline import timeline_of
from .timeline_section import timeline_section
from .tree import Module, tree_of
from .weights_section import Explained, weights_section


def report_page(
    plan: PlanData, title: str = "", *, explain: bool = True, beside: PlanData | None = None
) -> str:
    """A plan as a page of HTML.

    Args:
        plan: the plan; one from disk has neither alternatives nor a graph, so the page lacks them.
        title: what the page is called, such as the model's name.
        explain: with the alternatives of every weight.
        beside: another plan, to be shown with what differs.
    """
    tree = tree_of(plan.layout.params)
    sections = {"Memory": memory_section(plan.layout, tree)}
    sections["Weights"] = weights_section(plan.layout, tree, _explained(plan, tree) if explain else {})
    if plan.planned is not None:
        stretches = timeline_of(plan.planned, plan.cost)
        sections["Step"] = timeline_section(stretches, plan.seconds, plan.cost.name)
    if plan.rewritten is not None:
        sections["Graph"] = graph_section(plan.rewritten)
    sections["Collectives"] = _collectives(plan)
    sections["Notes"] = _notes(plan)
    if beside is not None:
        sections["Beside"] = beside_section(plan, beside)
    script = Markup(files(__package__).joinpath("report.js").read_text())
    head = (
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title or 'A model'} on {plan.layout.ranks} ranks"),
        tag("style", Markup(files(__package__).joinpath("report.css").read_text())),
    )
    body = tag(
        "body",
        tag("main", _head(plan, title, sections), *sections.values()),
        data("plan", _data(plan, tree)),
        tag("script", script),
    )
    return join(Markup("<!doctype html>\n"), tag("html", tag("head", *head), body, lang="en"), "\n")


def _explained(plan: PlanData, tree: Module) -> Explained:
    found: dict[str, list[Explanation]] = {}
    if plan.planned is not None and plan.pins is not None:
        names = {weight.name for weight in tree.every_weight()}
        for each in explanations(plan.planned, plan.cost, plan.pins, names):
            found.setdefault(each.name, []).append(each)
    return found


def _head(plan: PlanData, title: str, sections: Iterable[str]) -> Markup:
    layout = plan.layout
    axes = "" if len(layout.axis_sizes) == 1 else f" as {' × '.join(map(str, layout.axis_sizes))}"
    outcome = outcome_of(plan)
    share = outcome.held * layout.ranks / max(plan.model_bytes, 1)
    figures = (
        (size_text(plan.model_bytes), "parameters and buffers"),
        (size_text(outcome.held), f"on the fullest rank, {share:.3f} × its share"),
        (str(outcome.collectives), f"collectives in a forward, of {size_text(outcome.moved)}"),
        (time_text(outcome.seconds), f"predicted for the example ({plan.cost.name})"),
    )
    proof = plan.proof.head if plan.proof is not None else "from disk: proved again when it is followed"
    links = [tag("a", text, href=f"#{text.lower()}") for text in sections]
    return tag(
        "header",
        tag("p", "tpcompile plan", class_="kind"),
        tag("h1", title or "A model", tag("small", f" on {layout.ranks} ranks{axes}")),
        tag("nav", *links, aria_label="Sections"),
        tag(
            "ul",
            *(tag("li", tag("b", value), tag("span", what)) for value, what in figures),
            class_="figures",
        ),
        tag("p", proof, class_="proof"),
    )


def _collectives(plan: PlanData) -> Markup:
    rows = [
        tag(
            "tr",
            tag("td", tag("code", c.kind)),
            tag("td", tag("code", c.where or "(top)")),
            tag("td", f"× {c.count}", class_="number"),
            tag("td", size_text(c.bytes), class_="number"),
            tag("td", size_text(c.count * c.bytes), class_="number"),
        )
        for c in plan.collectives
    ]
    head = table_head(("collective", "where"), ("times", "each", "together"))
    return tag(
        "section",
        tag("h2", "What a forward communicates"),
        tag("table", head, tag("tbody", *rows)) if rows else tag("p", "Nothing."),
        id="collectives",
    )


def _notes(plan: PlanData) -> Markup:
    lines = [tag("li", tag("b", "computed whole "), line) for line in plan.fallbacks]
    lines += [tag("li", note) for note in (*plan.notes, *idle_lines(plan.layout))]
    none = tag("p", "Nothing was refused: every operator is computed on parts where its weights are divided.")
    return tag(
        "section",
        tag("h2", "Kept whole, and other notes"),
        tag("ul", *lines, class_="notes") if lines else none,
        id="notes",
    )


def _data(plan: PlanData, tree: Module) -> dict[str, object]:
    """What scripts, and others, read from the page."""
    layout = plan.layout
    return {
        "ranks": layout.ranks,
        "axes": layout.axis_sizes,
        "seconds": plan.seconds,
        "cost": plan.cost.name,
        "weights": [
            {
                "path": w.path,
                "count": w.count,
                "shape": w.layout.shape,
                "placement": placement_text(w.layout),
                "bytes": layout.local_bytes(w.name, 0),
            }
            for w in tree.every_weight()
        ],
        "collectives": [vars(c) for c in plan.collectives],
    }

"""The tree of modules and weights, with how each is divided and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.units import ranks_named, size_text
from tpcompile.planner.explain import Decision, Explanation
from tpcompile.planner.print_plan import placement_text

from .draw_partition import Drawings, describe, rank_colour
from .markup import Markup, join, tag
from .partition import Partition, partition_of
from .tree import Module, Weight

Explained = Mapping[str, Sequence[Explanation]]

_MOST_RANKS = 16
"""How many ranks' local shapes are listed."""


@dataclass
class _Shown:
    """What all rows of the section need."""

    layout: WeightLayout
    explained: Explained
    drawings: Drawings = field(default_factory=Drawings)


def weights_section(layout: WeightLayout, tree: Module, explained: Explained) -> Markup:
    """The section.

    Args:
        layout: where weights are.
        tree: the model.
        explained: why, by the name of a weight; empty for a plan from disk.
    """
    shown = _Shown(layout, explained)
    head = tag(
        "div",
        *(tag("span", text) for text in ("weight", "held as", "shape", "on rank 0")),
        class_="row head",
        aria_hidden="true",
    )
    return tag(
        "section",
        tag("h2", "Weights"),
        tag(
            "p",
            "Modules that are alike are shown once. The rectangle is the whole weight; a colour is a rank. "
            "Open a weight to see who holds what, and what the alternatives would cost.",
            class_="lead",
        ),
        tag(
            "div",
            tag("label", "Find", for_="find"),
            tag("input", id="find", type="search", placeholder="part of a name, S(0)", autocomplete="off"),
            tag("button", "Open all", type="button", id="open"),
            tag("button", "Close all", type="button", id="close"),
            tag("output", id="found", aria_live="polite"),
            class_="tools",
        ),
        head,
        tag("div", *_inside(shown, tree), class_="tree"),
        shown.drawings.all(),
        id="weights",
    )


def _inside(shown: _Shown, module: Module) -> list[Markup]:
    return [
        _weight(shown, each) if isinstance(each, Weight) else _module(shown, each) for each in module.inside
    ]


def _module(shown: _Shown, module: Module) -> Markup:
    weights = list(module.every_weight())
    held = sum(w.count * shown.layout.local_bytes(w.name, 0) for w in weights)
    whole = sum(w.count * w.layout.bytes for w in weights)
    number = sum(w.count for w in weights)
    return tag(
        "details",
        tag(
            "summary",
            tag("span", tag("b", module.label), _times(module.count), class_="label"),
            tag("span", f"{number} weight{'s' if number > 1 else ''}", class_="held"),
            tag("span", size_text(whole), class_="shape"),
            tag("span", size_text(held), class_="number"),
            class_="row",
        ),
        tag("div", *_inside(shown, module), class_="inside"),
        class_="module",
        open=True,
        data_find=module.path.lower(),
    )


def _weight(shown: _Shown, weight: Weight) -> Markup:
    layout, partition = shown.layout, partition_of(shown.layout, weight.name)
    placement = placement_text(weight.layout)
    small = tag("span", class_="none") if partition is None else shown.drawings.draw(partition, 84, 26)
    return tag(
        "details",
        tag(
            "summary",
            tag("span", small, tag("span", weight.label), _times(weight.count), class_="label"),
            tag("code", placement, class_="held"),
            tag("span", _shape(weight.layout.shape), class_="shape"),
            tag("span", size_text(layout.local_bytes(weight.name, 0)), class_="number"),
            class_="row",
        ),
        tag(
            "div",
            _figure(shown.drawings, weight, partition, placement),
            tag("div", _facts(layout, weight), *_why(shown.explained.get(weight.name, ())), class_="words"),
            class_="detail",
        ),
        class_="weight",
        data_find=f"{weight.path} {placement}".lower(),
        data_name=weight.path,
    )


def _times(count: int) -> Markup:
    return tag("span", f"× {count}", class_="times") if count > 1 else Markup()


def _figure(drawings: Drawings, weight: Weight, partition: Partition | None, placement: str) -> Markup:
    if partition is None:
        text = f"{placement} holds parts that are not rows and columns of the whole."
        return tag("figure", tag("figcaption", text))
    shape, (rows, columns) = weight.layout.shape, partition.dims
    axes = []
    if rows is not None:
        axes.append(f"Rows: dimension {rows}, {shape[rows]} long")
    if columns is not None:
        axes.append(f"Columns: dimension {columns}, {shape[columns]} long")
    hidden = [d for d in range(len(shape)) if d not in partition.dims]
    axes += [f"Dimension {d}, {shape[d]} long, is not drawn" for d in hidden]
    drawing = drawings.draw(partition, 340, 190 if rows is not None else 34, labels=True)
    caption = f"{describe(partition).capitalize()}. {'. '.join(axes)}."
    return tag("figure", drawing, tag("figcaption", caption))


def _facts(layout: WeightLayout, weight: Weight) -> Markup:
    param = weight.layout
    shapes: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.ranks):
        shapes.setdefault(layout.local_shape(weight.name, rank), []).append(rank)
    rows = [("name", tag("code", weight.path)), ("type", str(param.dtype).removeprefix("torch."))]
    rows.append(("whole", f"{_shape(param.shape)}, {size_text(param.bytes)}"))
    for shape, ranks in list(shapes.items())[:_MOST_RANKS]:
        swatches = [_swatch(rank, layout.ranks) for rank in ranks[:_MOST_RANKS]] if len(shapes) > 1 else []
        names = "every rank" if len(ranks) == layout.ranks else ranks_named(tuple(ranks))
        size = size_text(layout.local_bytes(weight.name, ranks[0]))
        rows.append((names, join(*swatches, f"{_shape(shape)}, {size}")))
    for number, segment in enumerate(param.segments if len(param.segments) > 1 else ()):
        rows.append((f"segment {number}", _shape(segment.shape)))
    if weight.name in layout.undecided:
        rows.append(("note", "no program has used it yet: it is whole until one does"))
    return tag("dl", *(join(tag("dt", name), tag("dd", text)) for name, text in rows))


def _swatch(rank: int, ranks: int) -> Markup:
    return tag("i", class_="swatch", style=f"background:{rank_colour(rank, ranks)}", title=f"rank {rank}")


def _why(explanations: Sequence[Explanation]) -> list[Markup]:
    parts = []
    for each in explanations:
        uses = [tag("li", tag("code", use)) for use in each.uses]
        rows = [row for decision in each.decisions for row in _decision(decision)]
        parts += [
            tag("h4", "Why ", tag("code", each.factors)),
            tag("ul", *uses, class_="uses"),
            tag("table", *rows, class_="why"),
        ]
    return parts


def _decision(decision: Decision) -> list[Markup]:
    chosen = [tag("td", tag("code", decision.chosen)), tag("td", f"chosen{decision.where}")]
    rows = [tag("tr", *chosen, class_="chosen")]
    for option, price in decision.others:
        kind = "refused" if price.startswith("refused") else "saves" if price.startswith("-") else "costs"
        rows.append(tag("tr", tag("td", tag("code", option)), tag("td", price), class_=kind))
    return rows


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "a number"

"""What differs between two plans: where weights are, what is communicated, what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.names import starred
from tpcompile.ir.units import size_text

from .collective import Collective
from .compare_plans import outcome_of
from .plan_data import PlanData
from .print_plan import placement_text


@dataclass(frozen=True)
class Change:
    """Weights that two plans hold differently; those of layers that are alike are together.

    Attributes:
        path: their name, with ``*`` for numbers.
        name: the name of the first.
        count: how many.
        one: how the first plan holds them, "" if it has none of this name,
        other: and the second.
    """

    path: str
    name: str
    count: int
    one: str
    other: str


def changes(one: WeightLayout, other: WeightLayout) -> list[Change]:
    """The weights that differ, in the order of the first layout."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for name in dict.fromkeys([*one.params, *other.params]):
        both = one.params.get(name), other.params.get(name)
        if one.axis_sizes != other.axis_sizes or both[0] != both[1]:
            texts = held_text(one, name), held_text(other, name)
            if texts[0] == texts[1] and both[0] != both[1]:
                texts = f"{texts[0]}, one way", f"{texts[1]}, another way"
            if texts[0] != texts[1]:
                found.setdefault((starred(name), *texts), []).append(name)
    return [Change(path, names[0], len(names), a, b) for (path, a, b), names in found.items()]


def held_text(layout: WeightLayout, name: str) -> str:
    """``S(0) [64, 256] float32``: placement, local shape on rank 0, type."""
    if name not in layout.params:
        return ""
    param, local = layout.params[name], list(layout.local_shape(name, 0))
    return f"{placement_text(param)} {local} {str(param.dtype).removeprefix('torch.')}"


def communicated(one: PlanData, other: PlanData) -> Iterator[tuple[str, str]]:
    """Collectives that only one of the plans has: ``-`` for the first, ``+`` for the second."""
    mine, theirs = (Counter(map(_line, plan.collectives)) for plan in (one, other))
    yield from (("-", line) for line in (mine - theirs).elements())
    yield from (("+", line) for line in (theirs - mine).elements())


def _line(one: Collective) -> str:
    return f"{one.kind} x {one.count} of {size_text(one.bytes)} in {one.where or '(top)'}"


def plan_title(plan: PlanData) -> str:
    """``8 ranks as 2 x 4``."""
    axis_sizes = plan.layout.axis_sizes
    ranks = f"{plan.layout.ranks} rank{'s' if plan.layout.ranks > 1 else ''}"
    return ranks if len(axis_sizes) == 1 else f"{ranks} as {' x '.join(map(str, axis_sizes))}"


def diff_text(one: PlanData, other: PlanData) -> str:
    """What differs, ``-`` for the first plan and ``+`` for the second."""
    lines = [
        f"{sign} {plan_title(p)}: {outcome_of(p)} ({p.cost.name})" for sign, p in (("-", one), ("+", other))
    ]
    weights = changes(one.layout, other.layout)
    lines += ["", *(_changed(weights) or ["every weight is held the same"])]
    moved = [f"{sign} {line}" for sign, line in communicated(one, other)]
    lines += ["", *(moved or ["the same is communicated"])]
    for title, mine, theirs in (
        ("fallback", one.fallbacks, other.fallbacks),
        ("note", one.notes, other.notes),
    ):
        lines += [f"- {title}: {line}" for line in mine if line not in theirs]
        lines += [f"+ {title}: {line}" for line in theirs if line not in mine]
    return "\n".join(lines)


def _changed(weights: Sequence[Change]) -> list[str]:
    lines = []
    for change in weights:
        lines.append(f"{change.path} x {change.count}")
        lines += [f"- {change.one}"] if change.one else []
        lines += [f"+ {change.other}"] if change.other else []
    return lines

"""Sub-axes are planned one by one, and that loses nothing: the oracle is the joint problem."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from tests import families, programs
from tests.joint_plan import JointPlan
from tests.random_programs import random_program
from tpcompile.planner.assignment import Assignment
from tpcompile.planner.cost import PRESETS
from tpcompile.planner.search import Search
from tpcompile.planner.solve_axes import solve_axes
from tpcompile.work import Work

AXES = [(2, 2), (2, 3), (3, 2), (4, 2)]


def _search(work: Work, preset: str) -> Search:
    return Search(work.graph, work.factors(), work.params(), PRESETS[preset])


def _solve(search: Search, axes: Sequence[int]) -> list[Assignment]:
    return solve_axes(search, axes, lambda _: {})


def _worth(decisions: Sequence[Assignment]) -> float:
    return sum(d.penalty + d.price + d.cost for d in decisions)


@pytest.mark.parametrize("preset", ["cpu", "h100"])
def test_as_good_as_all_axes_together(preset: str) -> None:
    for seed in range(40, 64):
        axes = AXES[seed % len(AXES)]
        work = random_program(seed, calls=4 + seed % 9, ranks=math.prod(axes))
        search = _search(work, preset)
        best = JointPlan(search, axes).worth()
        assert _worth(_solve(search, axes)) == pytest.approx(best, rel=1e-9, abs=1e-12), seed


def test_an_earlier_axis_is_solved_again() -> None:
    """The norm over all key heads wants to know, on the first sub-axis, what the second will do."""
    work = programs.canonicalised(families.build("olmo2"), ranks=8, **families.causal_inputs(2, 16))
    search, axes = _search(work, "cpu"), (4, 2)
    best = JointPlan(search, axes).worth()
    first = search.plan(axes, 0, {})
    second = search.plan(axes, 1, {0: first})
    assert second.cost + second.price > best + 1e-5
    found = _solve(search, axes)
    assert _worth(found) == pytest.approx(best, rel=1e-9)
    for axis in range(2):  # nothing is left to improve, and the parts add up to the whole
        again = search.plan(axes, axis, {1 - axis: found[1 - axis]})
        assert _worth([again]) == pytest.approx(best, rel=1e-9)

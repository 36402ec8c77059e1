"""How a mesh axis is cut into sub-axes by the unit counts of a model."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpcompile.planner.search.sub_axes import sub_axes


@pytest.mark.parametrize(
    ("ranks", "units", "expected"),
    [
        (8, {2}, (2, 4)),
        (8, {4}, (4, 2)),
        (8, {2, 4}, (2, 2, 2)),
        (8, {8, 16}, (8,)),
        (8, {6}, (2, 4)),  # what six groups and eight ranks have in common
        (6, {4}, (2, 3)),
        (6, {3}, (3, 2)),
        (6, {2, 3}, (2, 3)),  # no cut at three fits behind one at two
        (12, {4, 6}, (4, 3)),
        (3, {2}, (3,)),  # nothing in common: uneven shards instead
        (5, {2, 3, 4}, (5,)),
        (4, {1}, (4,)),
        (4, set(), (4,)),
        (1, {2}, (1,)),
        (2, {2}, (2,)),
    ],
)
def test_examples(ranks: int, units: set[int], expected: tuple[int, ...]) -> None:
    assert sub_axes(ranks, units) == expected


@given(st.integers(1, 64), st.sets(st.integers(1, 64), max_size=4))
def test_they_make_up_the_axis(ranks: int, units: set[int]) -> None:
    axis_sizes = sub_axes(ranks, units)
    assert math.prod(axis_sizes) == ranks
    assert all(a > 1 for a in axis_sizes) or axis_sizes == (1,)


@given(st.integers(2, 64), st.integers(2, 64))
def test_one_count_fills_the_first(ranks: int, unit: int) -> None:
    common = math.gcd(ranks, unit)
    if unit < ranks and common > 1:
        assert sub_axes(ranks, {unit})[0] == common

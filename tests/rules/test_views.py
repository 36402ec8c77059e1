"""Common factors of two shapes: properties on random shapes, and examples as text."""

from __future__ import annotations

import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.check_rule import signed
from tpcompile.ir.sizes import Size
from tpcompile.rules.rule import Labels, Letters, letters_of
from tpcompile.rules.views import align
from tpcompile.runtime.verify.rule_program import Case, RuleProgram
from tpcompile.runtime.verify.run_rule import compare

SIZES = st.sampled_from([1, 2, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 12])
FACTORS = st.lists(SIZES, max_size=5)


def _text(labels: Labels, sizes: dict[str, Size]) -> str:
    dims = ["*".join(str(sizes[letter]) for letter in dim) or "1" for dim in labels]
    return " ".join(dims)


def _aligned(left: list[Size], right: list[Size]) -> tuple[Labels, Labels, set[str], dict[str, Size]]:
    letters = Letters()
    a, b, stuck = align(left, right, letters)
    return a, b, stuck, letters.sizes


def _cut(factors: list[int], cuts: list[bool]) -> list[int]:
    """Joins neighbouring factors where there is no cut."""
    shape: list[int] = []
    for factor, cut in zip(factors, [True, *cuts], strict=False):
        if cut:
            shape.append(factor)
        else:
            shape[-1] *= factor
    return shape


@st.composite
def _two_views(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of the same elements, factors joined at random."""
    factors = draw(FACTORS)
    cuts = st.lists(st.booleans(), min_size=len(factors), max_size=len(factors))
    return _cut(factors, draw(cuts)), _cut(factors, draw(cuts))


@given(_two_views())
def test_products_of_letters_are_the_sizes(shapes: tuple[list[int], list[int]]) -> None:
    left, right = shapes
    a, b, stuck, sizes = _aligned(list(left), list(right))
    for shape, labels in ((left, a), (right, b)):
        assert [math.prod(sizes[letter] for letter in dim) for dim in labels] == shape
        names = [letter for dim in labels for letter in dim]
        assert len(set(names)) == len(names)
    assert all(sizes[letter] != 1 for letter in sizes)
    shared = letters_of(a) & letters_of(b)
    assert stuck == (letters_of(a) | letters_of(b)) - shared
    # What is shared stands in the same order on both sides, before all that is stuck.
    for labels in (a, b):
        flat = [letter for dim in labels for letter in dim]
        kept = [letter for letter in flat if letter in shared]
        assert flat[: len(kept)] == kept == [letter for letter in sizes if letter in shared]


@given(FACTORS, st.data())
def test_a_refinement_is_aligned_wholly(factors: list[int], data: st.DataObject) -> None:
    """Joining dimensions, or splitting them again, leaves nothing that must stay whole."""
    cuts = data.draw(st.lists(st.booleans(), min_size=len(factors), max_size=len(factors)))
    joined = _cut(factors, cuts)
    for left, right in ((factors, joined), (joined, factors)):
        _, _, stuck, _ = _aligned(list(left), list(right))
        assert not stuck


@given(FACTORS, FACTORS)
def test_any_shapes_do_not_crash(left: list[int], right: list[int]) -> None:
    _aligned(list(left), list(right))


@settings(max_examples=15, deadline=None)
@given(_two_views())
def test_views_are_carried_out(shapes: tuple[list[int], list[int]]) -> None:
    left, right = shapes
    program = RuleProgram(Case(torch.ops.aten.view.default, (signed(*left), right)))
    for choice in program.choices():
        compare(program, (2,), [choice])


B, S = sympy.symbols("b s", positive=True, integer=True)


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([2, 60], [2, 12, 5], "2 12*5 -> 2 12 5"),
        ([4, 6, 5], [24, 5], "4 6 5 -> 4*6 5"),
        ([6, 10], [10, 6], "2*3 10 -> 2*5 6  stuck 3 5 6 10"),
        ([6, 35], [14, 15], "2*3 35 -> 2*7 15  stuck 3 7 15 35"),
        ([1, 6, 1], [6], "1 6 1 -> 6"),
        ([], [1, 1], " -> 1 1"),
        ([0, 4], [0], "0 4 -> 0  stuck 4"),
        ([B, S, 64], [B, S, 8, 8], "b s 8*8 -> b s 8 8"),
        ([B, S, 64], [B * S, 64], "b s 64 -> b*s 64"),
        ([B * 8, S], [B, 8, S], "b*8 s -> b 8 s"),
        ([8 * B, S], [8, B, S], "8*b s -> 8 b s"),
        ([B + S, 6], [6 * B + 6 * S], "b + s 6 -> b + s*6"),
        ([B, S], [S, B], "b s -> s b  stuck b b s s"),
    ],
)
def test_examples(left: list[Size], right: list[Size], expected: str) -> None:
    a, b, stuck, sizes = _aligned(left, right)
    text = f"{_text(a, sizes)} -> {_text(b, sizes)}"
    left_over = " ".join(sorted((str(sizes[letter]) for letter in stuck), key=lambda t: (len(t), t)))
    assert (f"{text}  stuck {left_over}" if stuck else text) == expected

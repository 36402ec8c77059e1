"""Every rule of the table with values and sizes that operators treat in ways of their own."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import pytest

from tests.helpers.check_rule import blame
from tests.helpers.rule_cases import CASES
from tests.helpers.special_cases import CHANGES, changed, emptied, program_of, without_sums
from tpcompile.rules.rule import Rule
from tpcompile.runtime.verify.rule_program import Case, compare

KNOWN: dict[str, list[tuple[str, str]]] = {"special": [], "half": [], "negative": [], "empty": []}
"""Calls whose ways differ by what no rule can help: operator and way, as patterns."""


def _wrong(cases: Iterable[Case], kind: str) -> tuple[int, list[str]]:
    """How many ways of the cases' rules were run on two ranks, and those that were wrong."""
    runs, wrong = 0, list[str]()
    for case in cases:
        program = program_of(case)
        if program is None or not isinstance(program.rule, Rule):
            continue
        chosen = program.choices(2)
        for choice in without_sums(chosen) if kind == "special" else chosen:
            if any(fnmatchcase(str(case), op) and fnmatchcase(str(choice), way) for op, way in KNOWN[kind]):
                continue
            runs += 1
            try:
                compare(program, (2,), (choice,))
            except Exception as error:
                wrong.append(f"{blame(program, (2,), (choice,))}\n  {type(error).__name__}: {error}")
    return runs, wrong


@pytest.mark.parametrize("kind", CHANGES)
def test_values(kind: str) -> None:
    """Numbers that are none, infinite ones, zeros of both signs; half precision; positions from the end."""
    found = [changed(case, CHANGES[kind]) for case in CASES]
    runs, wrong = _wrong([case for case in found if case is not None], kind)
    assert not wrong, "".join(wrong)
    assert runs > 50


def test_sizes_of_zero() -> None:
    runs, wrong = _wrong([empty for case in CASES for empty in emptied(case)], "empty")
    assert not wrong, "".join(wrong)
    assert runs > 50

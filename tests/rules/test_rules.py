"""Every rule is carried out: each choice that it offers computes what the whole operator computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import cache

import pytest

from tests.helpers.check_rule import blame
from tests.helpers.missing_rules import missing
from tests.helpers.rule_cases import CASES, EXCUSED, PAIRED, REFUSED, SAMPLED, WITHOUT_CASE
from tpcompile.rules.choices import Choice
from tpcompile.rules.rule import Rule
from tpcompile.rules.table import ROWS
from tpcompile.runtime.verify.rule_program import Case, RuleProgram
from tpcompile.runtime.verify.run_rule import compare, compare_gradients

Chosen = tuple[Choice, ...]


def _try_all(
    program: RuleProgram,
    axis_sizes: tuple[int, ...],
    choices: Iterable[Chosen],
    check: Callable[[RuleProgram, tuple[int, ...], Chosen], None],
) -> None:
    wrong = []
    for chosen in choices:
        try:
            check(program, axis_sizes, chosen)
        except Exception as error:
            wrong.append(f"{blame(program, axis_sizes, chosen)}\n  {type(error).__name__}: {error}")
    assert not wrong, "".join(wrong)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_strategies_compute_the_whole(case: Case) -> None:
    program = RuleProgram(case)
    assert isinstance(program.rule, Rule), program.rule
    _try_all(program, (3,), [(s,) for s in program.choices(3)], compare)
    scarce = [s for s in program.choices(5) if s.factor is not None and s.factor.size < 5]
    _try_all(program, (5,), [(s,) for s in scarce], compare)  # ranks without a part


@pytest.mark.parametrize("case", SAMPLED, ids=str)
def test_pointwise_operators_need_no_row(case: Case) -> None:
    program = RuleProgram(case)
    assert isinstance(program.rule, Rule), program.rule
    _try_all(program, (3,), [(s,) for s in program.choices()], compare)


@pytest.mark.parametrize("case", [c for c in CASES if c.gradients], ids=str)
def test_gradients_are_those_of_the_whole(case: Case) -> None:
    program = RuleProgram(case)
    _try_all(program, (2,), [(s,) for s in program.choices(2)], compare_gradients)


@pytest.mark.parametrize("case", PAIRED, ids=str)
def test_two_sub_axes(case: Case) -> None:
    program = RuleProgram(case)
    _try_all(program, (2, 2), program.pairs(), compare)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_division_is_missing(case: Case) -> None:
    found = [text for text in _missing(case, 1) if not _excused(case, text)]
    # What is found with other random numbers again is not a coincidence.
    assert not found or not set(found) & set(_missing(case, 2))


@cache
def _missing(case: Case, seed: int) -> list[str]:
    return missing(RuleProgram(case, seed))


def _excused(case: Case, text: str) -> bool:
    return any(_matches(case, text, excuse) for excuse in EXCUSED)


def _matches(case: Case, text: str, excuse: tuple[str, str, str]) -> bool:
    operator, inputs, _ = excuse
    return fnmatchcase(str(case.op), operator) and fnmatchcase(text.partition(" -> ")[0], inputs)


def test_every_excuse_is_needed() -> None:
    found = [(case, text) for case in CASES for text in _missing(case, 1)]
    assert all(any(_matches(case, text, excuse) for case, text in found) for excuse in EXCUSED)


@pytest.mark.parametrize(("case", "why"), REFUSED.items(), ids=str)
def test_refused(case: Case, why: str) -> None:
    program = RuleProgram(case)
    assert isinstance(program.rule, str)
    assert why in program.rule


def test_every_row_has_a_case() -> None:
    named = {name for case in (*CASES, *REFUSED) for name in (str(case.op), str(case.op).rpartition(".")[0])}
    assert not {row for row in ROWS if row not in named} - WITHOUT_CASE

"""Every rule is carried out: each strategy that it offers computes what the whole operator computes."""

from __future__ import annotations

import pytest

from tests.check_rule import Case, Program, blame, compare, compare_gradients
from tests.rule_cases import CASES


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("ranks", [2, 3])
def test_strategies_compute_the_whole(case: Case, ranks: int) -> None:
    program = Program(case)
    wrong = []
    for strategy in program.strategies():
        try:
            compare(program, (ranks,), [strategy])
        except Exception as error:
            wrong.append(f"{blame(program, (ranks,), [strategy])}\n  {type(error).__name__}: {error}")
    assert not wrong, "".join(wrong)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case: Case) -> None:
    program = Program(case)
    wrong = []
    for strategy in program.strategies():
        try:
            if case.gradients:
                compare_gradients(program, (3,), [strategy])
        except Exception as error:
            wrong.append(f"{blame(program, (3,), [strategy])}\n  {type(error).__name__}: {error}")
    assert not wrong, "".join(wrong)

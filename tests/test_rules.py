"""Every rule is carried out: each strategy that it offers computes what the whole operator computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from tests.check_rule import Case, Program, blame, compare, compare_gradients
from tests.rule_cases import CASES
from tpcompile.placements import Partial
from tpcompile.planner.strategies import Strategy

Choice = tuple[Strategy, ...]


def _try_all(
    program: Program,
    axes: tuple[int, ...],
    choices: Iterable[Choice],
    check: Callable[[Program, tuple[int, ...], Choice], None],
) -> None:
    wrong = []
    for chosen in choices:
        try:
            check(program, axes, chosen)
        except Exception as error:
            wrong.append(f"{blame(program, axes, chosen)}\n  {type(error).__name__}: {error}")
    assert not wrong, "".join(wrong)


# On seven ranks, most ranks have nothing of a dimension of 4 or 6.
@pytest.mark.parametrize("case", CASES, ids=str)
def test_strategies_compute_the_whole(case: Case) -> None:
    program = Program(case)
    for ranks in (2, 3, 7):
        _try_all(program, (ranks,), [(s,) for s in program.strategies(ranks)], compare)


@pytest.mark.parametrize("case", [c for c in CASES if c.gradients], ids=str)
def test_gradients_are_those_of_the_whole(case: Case) -> None:
    program = Program(case)
    _try_all(program, (3,), [(s,) for s in program.strategies(3) if _differentiable(s)], compare_gradients)


def _differentiable(strategy: Strategy) -> bool:
    """A maximum over ranks has no gradient (lowering/collectives.py refuses it)."""
    return not any(isinstance(p, Partial) and p.op != "sum" for p in strategy.outputs)

"""The exact solver against trying everything."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpcompile.errors import TpCompileError
from tpcompile.planner.search import eliminate
from tpcompile.planner.search.eliminate import Problem, extras, solve

COST = st.one_of(st.integers(0, 3).map(float), st.just(float("inf")))


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Few variables, tables of one to three of them, small costs so that ties abound, some impossible."""
    problem = Problem()
    domains = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    for i, size in enumerate(domains):
        problem.variable(i, draw(st.lists(COST, min_size=size, max_size=size)))
    scopes = [s for k in (2, 3) for s in itertools.permutations(range(len(domains)), k)]
    if scopes:
        for scope in draw(st.lists(st.sampled_from(scopes), max_size=7)):
            shape = [domains[i] for i in scope]
            count = int(np.prod(shape))
            costs = draw(st.lists(COST, min_size=count, max_size=count))
            problem.table(scope, np.array(costs).reshape(shape))
    return problem


def brute_force(problem: Problem) -> float:
    """The least cost of all assignments."""
    names = list(problem.domains)
    candidates = itertools.product(*(range(problem.domains[n]) for n in names))
    return min(problem.cost(dict(zip(names, c, strict=True))) for c in candidates)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(problems())
def test_equals_brute_force(problem: Problem) -> None:
    wanted = brute_force(problem)
    if wanted == float("inf"):
        with pytest.raises(TpCompileError, match="no placement satisfies"):
            solve(problem)
        return
    values, cost = solve(problem)
    assert cost == wanted
    assert problem.cost(values) == wanted
    assert values.keys() == problem.domains.keys()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problems())
def test_extras_are_those_of_all_assignments(problem: Problem) -> None:
    best = brute_force(problem)
    if best == float("inf"):
        return
    found = extras(problem)
    for name, size in problem.domains.items():
        for value in range(size):
            wish = np.where(np.arange(size) == value, 0.0, np.inf)
            held = Problem(problem.domains, [*problem.tables, ((name,), wish)])
            assert found[name][value] == brute_force(held) - best


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problems(), st.randoms())
def test_the_order_of_tables_breaks_no_tie(problem: Problem, rng: random.Random) -> None:
    shuffled = Problem(dict(problem.domains), rng.sample(problem.tables, len(problem.tables)))
    try:
        wanted = solve(problem)
    except TpCompileError:
        return
    assert solve(shuffled) == wanted


def test_a_long_chain() -> None:
    """A chain of 2000 variables in which each wants to differ from the one before."""
    problem = Problem()
    for i in range(2000):
        problem.variable(i, np.zeros(3))
        if i:
            problem.table((i - 1, i), np.eye(3))
    values, cost = solve(problem)
    assert cost == 0
    assert all(values[i] != values[i - 1] for i in range(1, 2000))


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eliminate, "LARGEST_BUCKET", 100)
    problem = Problem()
    for i in range(4):
        problem.variable(i, np.zeros(10))
    for a, b in itertools.combinations(range(4), 2):
        problem.table((a, b), np.zeros((10, 10)))
    with pytest.raises(TpCompileError, match="too large"):
        solve(problem)


def test_nothing_to_decide() -> None:
    assert solve(Problem()) == ({}, 0.0)

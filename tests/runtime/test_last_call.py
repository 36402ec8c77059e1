"""Calls that equal the last one but for values are known at once; all that selects a program still does."""

from __future__ import annotations

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import last_call as on_ranks


def test_a_call_like_the_last_one_is_not_looked_for() -> None:
    for found in run_spmd(on_ranks.again, 2):
        assert found["worst"] < 1e-6
        assert found["looked for"] == []


def test_whatever_selects_a_program_is_asked_of_a_call_like_the_last_one() -> None:
    for found in run_spmd(on_ranks.changes, 2):
        assert found["wrong"] == {}
        assert found["not known"] == []

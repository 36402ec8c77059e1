"""Ranks that are out of step, or gone: the others say so, in time."""

from __future__ import annotations

import re

import pytest

import tpcompile
from tests.helpers.run_ranks import SpmdError, run_spmd
from tests.on_ranks import apart


def test_ranks_out_of_step() -> None:
    """Both say what they were about; none hangs, and none is crossed with the other."""
    first, second = run_spmd(apart.out_of_step, 2)
    missed = "rank 1 did not take part within 2 s, while this rank was to "
    collective = "complete the all-reduce of a program"
    assert missed + collective in first[0] and "the program (x: " in first[0]
    assert missed + collective in first[1]
    assert f"this rank was to compare calls, rank 1 was to {collective}" in first[2]
    assert f"this rank was to {collective}, rank 0 was to compare calls" in second[2]
    for each in (first, second):
        # Who it was is known if the note of the late one is not there yet when the others look for it.
        assert re.search(r"(the ranks did not all come|rank [01] did not take part) within 2 s", each[3])
        assert collective in each[3]
        assert "rank 0 is to take the state dict, rank 1 is to compare calls" in each[4]
    # What one rank does beside the calls is not taken for a part of the other's program.
    assert f"this rank was to add up norms or sums of weights, rank 1 was to {collective}" in first[5]
    assert f"this rank was to compare steps of an optimizer, rank 1 was to {collective}" in first[6]
    assert "rank 1 did not come to share a model within 0.4 s" in first[7]
    assert second[:2] == ["accepted"] * 2


@pytest.mark.parametrize(("how", "when"), [("killed", "run"), ("exit", "capture"), ("exit", "run compiled")])
def test_a_rank_that_ends(how: str, when: str) -> None:
    """Noticed at once, not after the time limit of a minute."""
    told = "rank 1 left, or its connection was lost, while this rank was to"
    with pytest.raises(SpmdError, match=rf"RanksApart: {told} (complete|compare calls|run)"):
        run_spmd(apart.ends, 2, how, when, timeout=110)


def test_the_limit_of_the_users_group_counts() -> None:
    assert max(run_spmd(apart.waits_as_its_group, 2, 1.0)) < 20


@pytest.mark.parametrize("wrong", [0, -1.0, float("nan"), float("inf"), "60", None, True])
def test_time_limits_that_are_none(wrong: object) -> None:
    with pytest.raises(tpcompile.TpCompileError, match="is not a time limit"):
        tpcompile.ranks.own_groups.seconds_of(wrong)

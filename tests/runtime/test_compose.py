"""Modules that cannot be captured run as python over their parts, on two gloo processes."""

from __future__ import annotations

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import compose as spmd_compose


def test_what_runs_as_python_keeps_its_own_weights_whole() -> None:
    """Also when a later call could be captured, and could divide them."""
    for found in run_spmd(spmd_compose.in_either_order, 2, False):
        assert len(found["errors"]) == 3 and max(found["errors"]) <= 1e-12
        assert found["gradients"] <= 1e-12
        assert found["warned"] == ["PartlyCapturable", "table", "experts"]
        assert found["entries"] == {"mlp", ""}
        assert found["shapes"] == [(4, 12, 12), (10, 12), (16, 12)]


def test_parts_are_offered_where_they_are_not_wanted() -> None:
    for found in run_spmd(spmd_compose.not_composed, 2):
        assert all("compose=True" in text for text in found), found


def test_what_a_method_reads_stays_whole() -> None:
    assert max(run_spmd(spmd_compose.read_in_helper, 2)) <= 1e-6


def test_a_hook_where_python_reads_divided_weights() -> None:
    assert max(run_spmd(spmd_compose.hook_inside, 2)) <= 1e-6


def test_what_is_divided_already_runs_as_python_over_gathered_weights() -> None:
    for found in run_spmd(spmd_compose.in_either_order, 2, True):
        assert len(found["errors"]) == 3 and max(found["errors"]) <= 1e-12
        assert found["gradients"] <= 1e-12
        assert found["shapes"] == [(4, 12, 6), (10, 12), (16, 12)]


def test_a_wrong_call_is_refused_and_forgotten() -> None:
    for found in run_spmd(spmd_compose.wrong_calls, 2):
        assert found["told"] == 4
        assert found["entries"] == ["", ""]
        assert found["error"] <= 1e-5

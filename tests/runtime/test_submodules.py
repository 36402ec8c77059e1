"""Submodules of a sharded model called on their own, on two gloo processes."""

from __future__ import annotations

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import submodules as spmd_submodules

F64 = 1e-6  # rotary tables are computed in float32


def test_submodules_have_programs_of_their_own() -> None:
    for found in run_spmd(spmd_submodules.parts_of_llama, 2, timeout=300):
        assert max(found.values()) <= F64, found


def test_gradients_through_submodules() -> None:
    assert max(run_spmd(spmd_submodules.gradients_of_parts, 2, timeout=300)) <= 1e-11


def test_a_later_program_divides_what_is_packed_by_its_parts() -> None:
    for found in run_spmd(spmd_submodules.packed_later, 2):
        assert found["error"] <= 1e-12 and found["state"]
        assert found["shape"] == (25, 20)
        assert found["collectives"] == ["all_reduce"]


def test_replaced_layers_are_refused() -> None:
    for messages in run_spmd(spmd_submodules.replaced_layers, 2, timeout=300):
        assert all("before parallelize" in message for message in messages), messages

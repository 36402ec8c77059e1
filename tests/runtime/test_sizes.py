"""Calls of every size, and values that change from call to call, beside the unsharded model."""

from __future__ import annotations

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import sizes


def test_sizes_of_one_get_programs_of_their_own() -> None:
    for found in run_spmd(sizes.sizes, 2):
        for name, (error, programs) in found.items():
            assert error < 1e-5, name
            # Open, one sentence, one token, both; what follows from other sizes is another one.
            assert programs <= {"LastTwo": 6, "Empty": 5}.get(name, 4), (name, programs)


def test_types_without_keys() -> None:
    assert max(run_spmd(sizes.without_keys, 2)) < 1e-5


def test_values_that_are_not_what_they_equal() -> None:
    assert run_spmd(sizes.values_that_are_not_what_they_equal, 2) == [(True, 3)] * 2


def test_numbers_that_are_no_sizes() -> None:
    assert max(run_spmd(sizes.large_numbers, 2)) < 1e-5


def test_parameters_among_arguments() -> None:
    for worst, programs in run_spmd(sizes.parameters_among_arguments, 2):
        assert worst < 1e-5 and programs == 3


def test_numbers_that_change_are_few_programs() -> None:
    """0, 1, and a symbol; where a symbol would do something else, or is none, the last few."""
    for rank, found in enumerate(run_spmd(sizes.numbers, 2)):
        assert max(error for error, _, _ in found.values()) < 1e-5, found
        assert found["Positioned"][1:] == (3, 0)
        for name in ("Kept", "Scaled"):
            assert found[name][1] <= 9, found
            assert (found[name][2] > 0) == (rank == 0), found

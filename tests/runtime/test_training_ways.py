"""Twenty steps of AdamW give what they give unsharded, in every way to train."""

from __future__ import annotations

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import training_ways


def test_twenty_steps() -> None:
    for found in run_spmd(training_ways.differences, 2, timeout=300):
        assert found.keys() == training_ways.WAYS.keys()
        assert max(error for errors in found.values() for error in errors) <= 1e-10, found

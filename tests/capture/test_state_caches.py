"""Recurrent state is carried like any cache: explicit, divided, in the caller's own object."""

from __future__ import annotations

import pytest

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import encoder_decoder as spmd_encoder_decoder


@pytest.mark.parametrize("name", ["mamba", "bamba"])
def test_state_in_the_callers_cache(name: str) -> None:
    for found in run_spmd(spmd_encoder_decoder.caller_cache, 2, name, timeout=400):
        assert max(found["errors"]) <= 1e-6, found  # recurrences are computed in float32
        # The example, the prompt, one for all single steps, and the prompt with a cache that was reset.
        assert found["programs"] == 4, found

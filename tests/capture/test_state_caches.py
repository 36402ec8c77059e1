"""Recurrent state is carried like any cache: explicit, divided, in the caller's own object."""

from __future__ import annotations

import pytest
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import encoder_decoder as spmd_encoder_decoder
from tpcompile.capture.caches.register import register_cache_support
from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import pytree


@pytest.mark.parametrize("name", ["mamba", "bamba"])
def test_state_in_the_callers_cache(name: str) -> None:
    for found in run_spmd(spmd_encoder_decoder.caller_cache, 2, name, timeout=400):
        assert max(found["errors"]) <= 1e-6, found  # recurrences are computed in float32
        # The example, the prompt, one for all single steps, and the prompt with a cache that was reset.
        assert found["programs"] == 4, found


class OwnLayer(DynamicLayer):  # type: ignore[misc]
    """Keeps what it is given otherwise."""


def test_layers_that_a_cache_would_make() -> None:
    register_cache_support()
    cache = DynamicCache()
    cache.layer_class_to_replicate = OwnLayer
    with pytest.raises(TpCompileError, match="makes layers of the class OwnLayer"):
        pytree.tree_flatten(cache)

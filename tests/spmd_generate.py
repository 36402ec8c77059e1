"""What the ranks do in ``test_generate``: functions that travel to the processes by their import path."""

from __future__ import annotations

import copy
from typing import Any

import torch

import tpcompile
from tests import families
from tests.spmd_models import build, mesh

GREEDY = {"do_sample": False, "eos_token_id": None}


def tokens(name: str, batch: int, prompt: int, options: dict[str, Any]) -> dict[str, Any]:
    """Generates with the whole and with the sharded model; what they say, and what it took."""
    model = build(name)
    whole = copy.deepcopy(model)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=families.causal_inputs())
    ids = families.token_ids(batch, prompt)
    result = sharded.generate(ids, **GREEDY, **options, return_dict_in_generate=True)
    expected = whole.generate(ids, **GREEDY, **options)
    return {
        "same": torch.equal(result.sequences, expected),
        "programs": [str(p) for p in sharded.programs[1:]],
        "cache": [tuple(layer.keys.shape) for layer in result.past_key_values.layers],
    }

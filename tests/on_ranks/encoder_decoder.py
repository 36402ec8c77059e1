"""What the ranks do in ``test_encoder_decoder`` and ``test_state_caches``."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
import torch.distributed as dist
import transformers

import tpcompile
from tests.helpers import families
from tests.on_ranks.models import error, mesh

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
BRIEF = GREEDY | {"max_new_tokens": 2}
"""A prompt and one step: where what is asked has nothing to do with steps, whose programs take their time."""


def tokens(
    name: str,
    fields: dict[str, Any] | None = None,
    greedy: dict[str, Any] = GREEDY,
    dynamic: bool = True,
) -> dict[str, Any]:
    """Generates with the whole and the sharded model; what they say, the programs, the cache.

    Args:
        name: a family.
        fields: of the model's configuration, other than the family's.
        greedy: options of ``generate``.
        dynamic: whether sizes may change.
    """
    model = families.build(name, **fields or {})
    whole = copy.deepcopy(model)
    example = families.inputs(name, 2, 16)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=example, dynamic=dynamic)
    drop = ("decoder_input_ids", "use_cache")
    given = {k: v for k, v in families.inputs(name, 3, 9).items() if k not in drop}
    options = greedy | {"return_dict_in_generate": True}
    result, expected = (m.generate(**given, **options) for m in (sharded, whole))
    cache = getattr(result, "past_key_values", None)
    return {
        "same": torch.equal(result.sequences, expected.sequences),
        "programs": [(program.entry, program.names) for program in sharded.programs],
        "shapes": [tuple(x.shape) for x in torch.utils._pytree.tree_leaves(cache) if torch.is_tensor(x)],
    }


def caller_cache(name: str) -> dict[str, Any]:
    """Steps with a cache that the caller keeps: it is updated in place, and read from there."""
    from transformers import DynamicCache

    layers = 1 if name == "mamba" else 2  # the other has one of each kind
    model = families.build(name, torch.float64, num_hidden_layers=layers)
    whole = copy.deepcopy(model)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=families.causal_inputs(2, 2))
    ids = families.token_ids(2, 6)
    worst = []
    caches = [DynamicCache(config=whole.config) for _ in range(2)]
    argument = "cache_params" if name == "mamba" else "past_key_values"
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 6)):
        step = ids[:, start:stop]
        with torch.no_grad():
            mine, theirs = (
                m(input_ids=step, use_cache=True, **{argument: cache}).logits
                for m, cache in zip((sharded, whole), caches, strict=True)
            )
        worst.append(error(mine, theirs))
    caches[0].reset()  # the tensors stay, but they are not state any more
    caches[1].reset()
    with torch.no_grad():
        mine, theirs = (
            m(input_ids=ids[:, :3], use_cache=True, **{argument: cache}).logits
            for m, cache in zip((sharded, whole), caches, strict=True)
        )
    worst.append(error(mine, theirs))
    return {"errors": worst, "programs": len(sharded.programs)}


def picture(folder: str) -> dict[str, Any]:
    """A model whose vision tower reads tensor values as python numbers, composed of captured parts."""
    whole = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    example = families.picture_inputs(2, 9)
    example["pixel_values"] = example["pixel_values"].double()
    sharded = tpcompile.from_pretrained(folder, mesh(), dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        worst = error(sharded(**example), whole(**example))
    entries = [program.entry for program in sharded.programs]
    given = {name: value for name, value in example.items() if name != "use_cache"} | BRIEF
    layout = sharded._tp.layout
    state, expected = sharded.full_state_dict(), whole.state_dict()
    return {
        "error": worst,
        "warnings": sum("runs as python" in str(w.message) for w in caught),
        "entries": entries,
        "tokens": torch.equal(sharded.generate(**given), whole.generate(**given)),
        "vision": layout.local_shape("model.visual.blocks.0.mlp.fc1.weight", dist.get_rank()),
        "state": all(torch.equal(state[k], expected[k]) for k in expected),
    }

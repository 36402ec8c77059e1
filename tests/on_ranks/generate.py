"""What the ranks do in ``test_generate``: functions that travel to the processes by their import path."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters

import tpcompile
from tests.helpers import families
from tests.on_ranks.models import build, mesh
from tests.on_ranks.module_life import refusal

GREEDY = {"do_sample": False, "eos_token_id": None}


def pair(name: str, **fields: Any) -> tuple[Any, Any]:
    """The whole model and the sharded one."""
    model = build(name, **fields)
    whole = copy.deepcopy(model)
    return whole, tpcompile.parallelize(model, mesh(), example_kwargs=families.causal_inputs())


def tokens(name: str, layers: int, calls: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    """Greedy tokens of the whole and of the sharded model, and what they took.

    Args:
        name: a family or an edge case.
        layers: how many it has.
        calls: kind of cache, length of the prompt, new tokens.
    """
    whole, sharded = pair(name, num_hidden_layers=layers)
    found = []
    for cache, prompt, new in calls:
        before = len(sharded.programs)
        options = {**GREEDY, "max_new_tokens": new, "cache_implementation": cache}
        ids = families.token_ids(2, prompt)
        result = sharded.generate(ids, **options, return_dict_in_generate=True)
        found.append(
            {
                "same": torch.equal(result.sequences, whole.generate(ids, **options)),
                "programs": len(sharded.programs) - before,
                "heads": [layer.keys.shape[1] for layer in result.past_key_values.layers],
            }
        )
    return found


def modes() -> dict[str, tuple[bool, float]]:
    """Other ways to generate, from padded prompts: whether tokens are the same, and how scores differ."""
    whole, sharded = pair("llama", num_hidden_layers=1)
    ids = families.token_ids(3, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    common = {"attention_mask": mask, "max_new_tokens": 6, "eos_token_id": None}
    ways: dict[str, dict[str, Any]] = {
        "greedy": {"do_sample": False},
        "static": {"do_sample": False, "cache_implementation": "static"},
        "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
        "static beams": {"do_sample": False, "num_beams": 3, "cache_implementation": "static"},
        "sample": {"do_sample": True, "top_k": 20, "num_return_sequences": 3},
    }
    found = {}
    for way, options in ways.items():
        results = []
        for model in (whole, sharded):
            # The sharded model is to follow rank 0, whatever the other ranks' seeds.
            torch.manual_seed(3 + (dist.get_rank() if model is sharded else 0))
            results.append(
                model.generate(
                    ids * mask, **common, **options, return_dict_in_generate=True, output_scores=True
                )
            )
        theirs, mine = results
        same = torch.equal(mine.sequences, theirs.sequences)
        found[way] = (same, max(map(_score_error, mine.scores, theirs.scores)))
    given = {"inputs_embeds": whole.get_input_embeddings()(ids), "max_new_tokens": 3, **GREEDY}
    found["embeddings"] = (torch.equal(sharded.generate(**given), whole.generate(**given)), 0.0)
    return found


def _score_error(mine: Tensor, theirs: Tensor) -> float:
    finite = theirs.isfinite()
    assert torch.equal(finite, mine.isfinite())
    return float((mine - theirs)[finite].abs().max() / theirs[finite].abs().max())


def compiled(name: str, cache: str, backend: dict[str, Any]) -> list[dict[str, Any]]:
    """Decoding with compiled programs: what was compiled and captured for a first and for a second text."""
    model = build(name, num_hidden_layers=1)
    whole = copy.deepcopy(model)
    example = families.causal_inputs()
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=example, compile=backend)
    options = {**GREEDY, "max_new_tokens": 16, "cache_implementation": cache}
    ids = families.token_ids(2, 7)
    counters.clear()
    found = []
    for _ in range(2):
        facts = {
            "same": torch.equal(sharded.generate(ids, **options), whole.generate(ids, **options)),
            "compiled": sum(len(steps.compiled) for p in sharded.programs for steps in p.steps.values()),
            "dynamo": counters["stats"]["unique_graphs"],
            "programs": len(sharded.programs),
        }
        found.append(facts)
    return found


def own_compile() -> dict[str, Any]:
    """The recipe of transformers' documentation: a static cache, and the forward under ``torch.compile``."""
    whole, sharded = pair("llama", num_hidden_layers=1)
    options = {**GREEDY, "max_new_tokens": 8, "cache_implementation": "static"}
    ids = families.token_ids(2, 7)
    sharded.generate(ids, **options)  # captures; under fullgraph nothing can be
    counters.clear()
    sharded.forward = torch.compile(sharded.forward, fullgraph=True, backend="eager")
    same = torch.equal(sharded.generate(ids, **options), whole.generate(ids, **options))
    return {"same": same, "graphs": counters["stats"]["unique_graphs"], "programs": len(sharded.programs)}


def steps(model: nn.Module, cache: Any, count: int) -> list[Tensor]:
    """Logits of a prompt and of single tokens, over a cache that the caller keeps and never reassigns."""
    ids = families.token_ids(2, 5 + count)
    with torch.no_grad():
        logits = [model(ids[:, :5], past_key_values=cache).logits]
        return logits + [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(5, 5 + count)]


def own_cache() -> dict[str, Any]:
    """Caches that the caller makes: updated in place, also whole ones, also where a tuple is returned."""
    from transformers import DynamicCache, StaticCache

    whole, sharded = pair("gemma2", num_hidden_layers=1)
    config = whole.config
    makers = {
        "dynamic": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=20),
    }
    found: dict[str, Any] = {}
    for name, make in makers.items():
        pairs = zip(steps(sharded, make(), 4), steps(whole, make(), 4), strict=True)
        found[name] = max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)
    cache, ids = DynamicCache(config=config), families.token_ids(2, 6)
    with torch.no_grad():
        whole(ids[:, :5], past_key_values=cache)  # all heads: each rank is to keep its own
        mine = sharded(ids[:, 5:], past_key_values=cache)
        found["is the caller's"] = mine.past_key_values is cache
        found["heads"] = [layer.keys.shape[1] for layer in cache.layers]
        theirs = whole(ids).logits[:, -1:]
        found["whole"] = float((mine.logits - theirs).abs().max() / theirs.abs().max())
        out = sharded(ids, return_dict=False)
        again = sharded(ids[:, :1], past_key_values=out[1], return_dict=False)
        other = whole(ids[:, :1], past_key_values=whole(ids).past_key_values).logits
        found["tuple"] = float((again[0] - other).abs().max() / other.abs().max())
    return found


def prompt_first(folder: str) -> dict[str, Any]:
    """A model that is captured for the prompt of ``generate``: it needs the step's program beside it."""
    whole = families.build("qwen3", num_hidden_layers=1)
    if dist.get_rank() == 0:
        whole.save_pretrained(folder)
    dist.barrier()
    loaded = tpcompile.from_pretrained(folder, mesh(), example_kwargs="generate")
    ids = families.token_ids(1, 7)
    options = {**GREEDY, "max_new_tokens": 5}
    programs = [len(loaded.programs)]
    same = torch.equal(loaded.generate(ids, **options), whole.generate(ids, **options))
    programs.append(len(loaded.programs))
    encoder = families.build("t5", num_layers=1, num_decoder_layers=1)
    said = refusal(lambda: tpcompile.parallelize(encoder, mesh(), example_kwargs="generate"))
    whole.generation_config.cache_implementation = "nothing"
    failed = refusal(lambda: tpcompile.parallelize(whole, mesh(), example_kwargs="generate"))
    return {"same": same, "programs": programs, "said": said, "failed": failed} | {
        "untouched": "forward" not in vars(whole) and not hasattr(whole, "_tp")
    }


def summed_keys() -> bool:
    """A plan that leaves each rank a summand of the keys: what is handed out is the sum."""
    model = families.build("llama", num_hidden_layers=1)
    whole = copy.deepcopy(model)
    pins = {"model.layers.0.self_attn.k_proj": "rowwise"}
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=families.causal_inputs(), plan=pins)
    ids = families.token_ids(2, 7)
    options = {**GREEDY, "max_new_tokens": 5}
    return torch.equal(sharded.generate(ids, **options), whole.generate(ids, **options))


def refusals() -> list[str]:
    """Calls that must be refused on all ranks, before anything is sent."""
    _, sharded = pair("llama", num_hidden_layers=1)
    ids = families.token_ids(2, 5)
    attempts: list[dict[str, Any]] = [
        {"cache_implementation": "offloaded"},
        {"cache_implementation": "quantized"},
        {"past_key_values": object()},
        {"input_ids": families.token_ids(2, 5 + dist.get_rank())},
        {"max_new_tokens": 3 + dist.get_rank()},
    ]
    messages = []
    for options in attempts:
        call = {"input_ids": ids, "max_new_tokens": 2, **GREEDY, **options}
        messages.append(refusal(lambda call=call: sharded.generate(**call)))  # type: ignore[misc]
    with torch.no_grad():
        cache = sharded(ids).past_key_values
        for layer in cache.layers:
            layer.keys = layer.keys[:, :1]
        messages.append(refusal(lambda: sharded(ids[:, :1], past_key_values=cache)))
    return messages

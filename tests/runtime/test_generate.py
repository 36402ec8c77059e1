"""``generate`` over sharded models: tokens of the unsharded model, caches divided by heads, few captures."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.helpers import families
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import generate as spmd_generate
from tpcompile import TpCompileError
from tpcompile.capture.caches.call_results import states_of
from tpcompile.capture.caches.register import register_cache_support
from tpcompile.capture.divide_caches import divide_caches
from tpcompile.capture.export.capture_model import capture
from tpcompile.capture.export.size_check import size_check
from tpcompile.capture.held_caches import Held
from tpcompile.ir.calls import bind_call, flatten_call
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.runtime.generates_alike import _describe
from tpcompile.runtime.generation import ShardedGeneration

TIMEOUT = 420
F32 = 1e-5
LONG = 14
"""New tokens; the windows of the families are 5."""


def check(name: str, ranks: int, calls: list[tuple[str, int, int, int]], heads: int, layers: int = 1) -> None:
    """Greedy calls: kind of cache, prompt, new tokens, programs that it may capture."""
    given = [call[:3] for call in calls]
    for found in run_spmd(spmd_generate.tokens, ranks, name, layers, given, timeout=TIMEOUT):
        for call, one in zip(calls, found, strict=True):
            assert one["same"], call
            assert one["programs"] == call[3], call
            assert set(one["heads"]) == {heads}, call


def test_llama() -> None:
    """A prefill and a decode program, whatever the lengths."""
    check(
        "llama",
        2,
        [("dynamic", 7, 24, 2), ("static", 7, 12, 2), ("dynamic", 9, 3, 0), ("static", 5, 9, 0)],
        2,
    )


def test_a_prompt_that_grows_past_the_window() -> None:
    """A program for the prompt, and one for the steps on either side of the full window."""
    check("gemma2", 2, [("static", 3, LONG, 3), ("dynamic", 9, LONG, 2)], 2)


def test_a_prompt_beyond_the_window() -> None:
    check("gpt_oss", 2, [("static", 9, LONG, 2)], 2)


def test_two_key_heads_on_four_ranks() -> None:
    check("two_kv_heads", 4, [("static", 7, 12, 2)], 1)


def test_programs_over_split_projections() -> None:
    """Later programs find packed weights divided by segments, as the first one split them."""
    check("phi3_unequal_segments", 2, [("dynamic", 5, 3, 2)], 2, layers=2)


def test_padding_beams_and_sampling() -> None:
    for found in run_spmd(spmd_generate.modes, 2, timeout=TIMEOUT):
        assert {way: same for way, (same, _) in found.items()} == dict.fromkeys(found, True)
        assert max(error for _, error in found.values()) <= F32


def test_compiled_decoding_compiles_once() -> None:
    backend = {"backend": "eager"}  # what is counted does not depend on it
    for found in run_spmd(spmd_generate.compiled, 2, "gemma2", "static", backend, timeout=TIMEOUT):
        assert found == [{"same": True, "compiled": 2, "dynamo": 0, "programs": 3}] * 2


def test_forward_under_the_users_own_compile() -> None:
    for found in run_spmd(spmd_generate.own_compile, 2, timeout=TIMEOUT):
        assert found == {"same": True, "graphs": 2, "programs": 3}


def test_caches_of_the_caller() -> None:
    for found in run_spmd(spmd_generate.own_cache, 2, timeout=TIMEOUT):
        assert found.pop("is the caller's")
        assert found.pop("heads") == [2]
        assert max(found.values()) <= F32, found


def test_a_model_that_is_captured_for_its_prompt(tmp_path: Path) -> None:
    for found in run_spmd(spmd_generate.prompt_first, 2, str(tmp_path / "model"), timeout=TIMEOUT):
        assert found["same"] and found["programs"] == [1, 2]
        assert "no generate that takes tokens alone" in found["said"]
        assert "its generate fails" in found["failed"] and found["untouched"]


def test_keys_that_are_sums_are_completed() -> None:
    assert all(run_spmd(spmd_generate.summed_keys, 2, timeout=TIMEOUT))


def test_refusals() -> None:
    expected = [
        "cache of the kind 'offloaded'",
        "cache of the kind 'quantized'",
        "would go stale",
        "different calls of generate",
        "different calls of generate",
        "handed out to this rank",
    ]
    for messages in run_spmd(spmd_generate.refusals, 2, timeout=TIMEOUT):
        for message, part in zip(messages, expected, strict=True):
            assert part in message


# -------------------------------------------------------------------------------------------- in one process


@pytest.mark.parametrize("shards", [((1, 0),), ((1, 0), None), ((1, 0), (1, 0)), ((1, 1), (1, 0))])
def test_parts_of_a_whole_cache(shards: tuple[tuple[int, int] | None, ...]) -> None:
    """All ranks' parts together are the whole; a part stays as it is; anything else is refused."""
    held = Held(((), (4, 3), (), (5,)), shards)
    axis_sizes = (2, 2)[: len(shards)]
    whole = torch.arange(2 * 12 * 3 * 5).reshape(2, 12, 3, 5)
    seen = torch.zeros(2, 12, 3, 5, dtype=torch.long)
    for at in itertools.product(*map(range, axis_sizes)):
        part = held.part(whole, axis_sizes, at)
        seen.view(-1)[part.reshape(-1)] = 1
        assert torch.equal(held.part(part, axis_sizes, at), part)
        assert part.shape[1] <= 12 and part.is_contiguous()
        with pytest.raises(TpCompileError, match="handed out to this rank"):
            held.part(whole[:, :11], axis_sizes, at)
    assert bool(seen.all())


def test_a_whole_cache_that_wants_a_gradient() -> None:
    """Each rank would compute that of its part; a cache is left as it was."""
    register_cache_support()
    held = {
        f"past_key_values[0]['{name}']": Held(((), (4,), (), (5,)), ((1, 0),)) for name in ("keys", "values")
    }
    whole, layout = torch.randn(2, 4, 3, 5), WeightLayout((2,), {})
    for keys, values in ((whole.clone().requires_grad_(), whole), (whole, whole.clone().requires_grad_())):
        cache = transformers.DynamicCache()
        cache.update(keys, values, 0)
        with pytest.raises(TpCompileError, match="wants a gradient"):
            divide_caches({"past_key_values": cache}, held, layout, 1)
        assert cache.layers[0].keys.shape == whole.shape
        with torch.no_grad():
            divide_caches({"past_key_values": cache}, held, layout, 1)
        assert torch.equal(cache.layers[0].values, whole[:, 2:])


class Prepares:
    """Has made its masks in some order."""

    def prepare_inputs_for_generation(self) -> dict[str, Any]:
        """What a step is given."""
        return {"attention_mask": {"b": 1, "a": 2}, "input_ids": 3, "tokenizer": 4}


def test_masks_have_one_order() -> None:
    kind: Any = type("Sharded", (ShardedGeneration, Prepares), {})
    inputs = kind().prepare_inputs_for_generation()
    assert list(inputs) == ["attention_mask", "input_ids"] and list(inputs["attention_mask"]) == ["a", "b"]


def caches(window: int) -> list[Any]:
    """Caches of every kind, without data, and with more tokens than the window."""
    config = families.build("gemma2", sliding_window=window).config
    found: list[Any] = []
    for new in (0, 3, 9):
        for cache in (
            transformers.DynamicCache(config=config),
            transformers.DynamicCache(),
            transformers.StaticCache(config=config, max_cache_len=14),
        ):
            for i, _ in enumerate(range(2) if new else ()):
                cache.update(torch.randn(2, 4, new, 12), torch.randn(2, 4, new, 12), i)
            found.append(cache)
    return found


def test_caches_come_apart_and_together() -> None:
    """A cache that was made of another one's tensors goes on as the other one does."""
    register_cache_support()
    for cache, twin in zip(caches(5), caches(5), strict=True):
        leaves, spec = flatten_call({"cache": cache})
        again = torch.utils._pytree.tree_unflatten(leaves, spec)["cache"]
        (state,) = states_of("cache", cache)
        state.put(twin, leaves)
        assert type(again) is type(cache)
        new = torch.randn(2, 4, 1, 12)
        # Made first: what was put together of a static cache's tensors writes into them.
        clones = [torch.utils._pytree.tree_map(torch.clone, cache) for _ in range(2)]
        for one, clone in zip((again, twin), clones, strict=True):
            for step in range(2):
                for i in range(2):
                    mine, theirs = one.update(new, new, i), clone.update(new, new, i)
                    assert all(map(torch.equal, mine, theirs)), (cache, step)
                    assert one.get_mask_sizes(1, i) == clone.get_mask_sizes(1, i)
                    assert one.get_seq_length(i) == clone.get_seq_length(i)


def test_calls_are_compared_by_what_is_in_them() -> None:
    """Configurations may hold tensors (assisted decoding puts them there); private fields differ freely."""
    texts = []
    for eos, private in ((2, 0), (2, 1), (3, 0)):
        config = transformers.GenerationConfig()
        config.eos_token_id, config._private = torch.tensor([eos]), private
        texts.append(_describe({"generation_config": config, "inputs": [torch.ones(2)]}))
    assert texts[0] == texts[1] != texts[2]


@torch.no_grad()
def test_a_size_check_says_what_the_program_says() -> None:
    """For a static sliding cache that is not full yet: guards, ranges, equal and fixed sizes."""
    model = families.build("gemma2", num_hidden_layers=1)

    def call(batch: int, past: int, new: int) -> dict[str, Any]:
        cache = transformers.StaticCache(config=model.config, max_cache_len=14)
        model(families.token_ids(batch, past), past_key_values=cache)
        return bind_call(model, (families.token_ids(batch, new),), {"past_key_values": cache})

    captured = capture(model, call(2, 2, 1))
    check = size_check(captured)
    verdicts = set()
    for sizes in itertools.product((1, 3), (2, 4, 5, 9), (1, 2)):
        leaves, spec = flatten_call(call(*sizes))
        assert spec == captured.in_spec
        assert check(leaves) == (captured.accepts(leaves) is None), sizes
        verdicts.add((sizes, check(leaves)))
    assert ((3, 4, 1), True) in verdicts and ((3, 5, 1), False) in verdicts and ((3, 4, 2), False) in verdicts

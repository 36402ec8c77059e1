"""Holds what a dry run predicts against what processes take: memory, and what they send.

    python -m benchmarks.predicted [--family llama] [--ranks 2] [--layers 6]

Each family is sharded over processes of this machine (gloo, eager mode, fp32), which run a step of training
with AdamW, a prompt, and one more token behind it, all of them for the second time: what the first captures
is not part of a step. Dispatch modes count the bytes of the storages that are alive, and the collectives.
The ratio is predicted / measured, for the rank that takes most.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM

import tpcompile
from benchmarks.wire import Wire
from tests.helpers.run_ranks import run_spmd
from tpcompile.ir.units import size_text
from tpcompile.planner.dry_run.estimate import Mode
from tpcompile.runtime.dry_run.live_bytes import LiveBytes

BATCH, LENGTH = 4, 96
TIMES = 3
FAMILIES = ("llama", "qwen3", "phi3", "gemma2", "gpt2", "mixtral", "deepseek_v3", "mamba")
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 192, "n_head": 8, "n_layer": 6, "n_positions": 256},
    "mixtral": {"num_local_experts": 4},
    "mamba": {"hidden_size": 192, "num_hidden_layers": 6, "state_size": 8},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "q_lora_rank": 48,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 8,
    },
}
Taken = dict[str, tuple[float, str]]
"""Per kind of step the bytes on a rank, and what it sends as text."""


def model_of(family: str, layers: int) -> nn.Module:
    """A small model with random weights."""
    sizes: dict[str, Any] = {
        "hidden_size": 192,
        "intermediate_size": 480,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 1000,
        "pad_token_id": 0,
    }
    if family in ("gpt2", "mamba"):
        sizes = {"vocab_size": 1000}
    sizes |= SIZES.get(family, {})
    sizes |= {name: layers for name in ("n_layer", "num_hidden_layers") if name in sizes}
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    return model.eval()


def predicted(model: nn.Module, ranks: int, batch: int = BATCH, length: int = LENGTH) -> Taken:
    """What the weights and each kind of step are said to take."""
    plan = tpcompile.plan(model, ranks, cost_model="cpu")
    modes: tuple[Mode, ...] = ("train", "prefill", "decode")
    found: Taken = {mode: said(plan.estimate(mode, batch=batch, seq=length, device="cpu")) for mode in modes}
    return {"weights": (plan.layout.fullest, ""), **found}


def said(step: tpcompile.Estimate) -> tuple[float, str]:
    """The bytes on a rank, and what is sent."""
    kinds: Counter[str] = Counter()
    for each in step.collectives:
        kinds[each.kind] += each.count
    return step.memory.peak, _sent_text(kinds, sum(each.sent for each in step.collectives))


def _sent_text(kinds: Mapping[str, int], sent: float) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())) + f": {sent / 1024:.1f} KiB"


def _bytes(tensors: Any) -> int:
    """Of the storages behind some tensors."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _step(known: list[Tensor], given: Tensor, ranks: int, call: Callable[[], object]) -> tuple[float, str]:
    """What a call takes; ``known``: what is there before, and stays; ``given``: the call's, not counted."""
    live, wire = LiveBytes(), Wire(ranks)
    for each in (*known, given):
        live.hold(each, counts=False)
    with wire, live:
        result = call()
    del result
    return _bytes(known) + live.peak, _sent_text(wire.count, wire.sent)


def _least(steps: Iterable[tuple[float, str]]) -> tuple[float, str]:
    """Of the same step several times: gloo's thread lets go of what it sent when it next gets a core, so that
    on a busy machine a step can take more than it needs, and never less."""
    sizes, sent = zip(*steps, strict=True)
    if len(set(sent)) > 1:
        raise AssertionError(f"the same step sends other things: {set(sent)}")
    return min(sizes), sent[0]


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's parts."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def measure(family: str, ranks: int, layers: int) -> Taken:
    """The same as ``predicted``, measured on this rank."""
    torch.manual_seed(0)
    model: Any = model_of(family, layers)
    tpcompile.parallelize(model, init_device_mesh("cpu", (ranks,)))
    ids = torch.randint(1000, (BATCH, LENGTH))
    train = training(model, lambda: model(input_ids=ids, labels=ids, use_cache=False).loss, ids, ranks)
    return {**generating(model, ids, ranks), "train": train}


def generating(model: Any, ids: Tensor, ranks: int) -> Taken:
    """What the weights, a prompt and the token behind it take on this rank, each for the second time."""
    weights = local_parts((*model.parameters(), *model.buffers()))
    found = {"weights": (float(_bytes(weights)), "")}
    with torch.no_grad():
        _next(model, ids, _prompt(model, ids))

        def decode() -> tuple[float, str]:
            caches = _prompt(model, ids)
            known = [*weights, *_tensors(caches)]
            return _step(known, ids, ranks, lambda: _next(model, ids, caches))

        def prefill() -> tuple[float, str]:
            return _step(weights, ids, ranks, lambda: model(input_ids=ids, use_cache=True))

        found["prefill"] = _least(prefill() for _ in range(TIMES))
        found["decode"] = _least(decode() for _ in range(TIMES))
    return found


def training(model: Any, loss: Callable[[], Tensor], given: Tensor, ranks: int) -> tuple[float, str]:
    """What a step of training takes on this rank, its second one; ``given``: what the loss is computed of."""
    optimizer = torch.optim.AdamW(model.parameters())

    def train() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    train()
    states = local_parts(v for state in optimizer.state.values() for v in state.values() if v.ndim)
    weights = local_parts((*model.parameters(), *model.buffers()))
    return _least(_step([*weights, *states], given, ranks, train) for _ in range(TIMES))


def _prompt(model: Any, ids: Tensor) -> dict[str, Any]:
    """The cache that a prompt leaves, by the name under which the next call takes it."""
    out = model(input_ids=ids, use_cache=True)
    name = "past_key_values" if "past_key_values" in out else "cache_params"
    return {name: out[name]}


def _next(model: Any, ids: Tensor, caches: dict[str, Any]) -> object:
    return model(input_ids=ids[:, :1], use_cache=True, **caches)


def _tensors(caches: dict[str, Any]) -> list[Tensor]:
    (cache,) = caches.values()
    layers = getattr(cache, "layers", None)
    values = [v for layer in layers for v in vars(layer).values()] if layers else list(vars(cache).values())
    flat = [x for v in values for x in (v if isinstance(v, list | tuple) else [v])]
    return [x for x in flat if isinstance(x, Tensor)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--family", action="append")
    options = parser.parse_args()
    print("| family | what | predicted | measured | ratio | what is sent |\n|---|---|---|---|---|---|")
    for family in options.family or FAMILIES:
        with torch.device("meta"):
            model = model_of(family, options.layers)
        expected = predicted(model, options.ranks)
        took = run_spmd(measure, options.ranks, family, options.ranks, options.layers, timeout=3600)
        for what, (size, sent) in expected.items():
            most = max(each[what][0] for each in took)
            others = {each[what][1] for each in took} - {sent}
            same = "the same" if not others else f"{sent} predicted, {' / '.join(others)} measured"
            print(
                f"| {family} | {what} | {size_text(size)} | {size_text(most)} | {size / most:.3f} | {same} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

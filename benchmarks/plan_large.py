"""Times ``tpcompile.plan`` for large models without weights: 8 ranks, no process group, no GPU, no cache.

python -m benchmarks.plan_large [8b] [70b] [405b]
"""

from __future__ import annotations

import os
import resource
import sys
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import tpcompile

SIZES = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
    },
    "405b": {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_attention_heads": 128,
        "num_hidden_layers": 126,
    },
}


def llama(name: str) -> PreTrainedModel:
    """One of the sizes, on the meta device."""
    config = LlamaConfig(**SIZES[name], num_key_value_heads=8, vocab_size=128256)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def main() -> None:
    """Plans each size and prints seconds, peak memory and the fullest rank's share."""
    os.environ["TPCOMPILE_CACHE"] = "0"  # what was planned before would take no time
    print("| model | layers | seconds | of these capture | the proof | peak GiB | fullest rank's share |")
    print("|---|---|---|---|---|---|---|")
    for name in sys.argv[1:] or list(SIZES):
        model = llama(name)
        start = time.perf_counter()
        ids = torch.zeros(2, 16, dtype=torch.long)
        plan = tpcompile.plan(model, 8, example_kwargs={"input_ids": ids, "use_cache": False})
        total = time.perf_counter() - start
        share = plan.layout.held(0) * 8 / plan.model_bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(
            f"| {name} | {model.config.num_hidden_layers} | {total:.1f} | {plan.timings['capture']:.1f} "
            f"| {plan.timings['proof']:.2f} "
            f"| {peak:.1f} | {share:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

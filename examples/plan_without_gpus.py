"""Plans Llama-3-8B for eight H100s on a laptop: no GPU, no process group, no weights.

python examples/plan_without_gpus.py
"""

from __future__ import annotations

import os
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tpcompile

# The published sizes of Llama-3-8B.
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)


def main() -> None:
    """Prints the plan."""
    with torch.device("meta"):  # shapes only: 8 billion parameters that take no memory
        model = LlamaForCausalLM(LLAMA_3_8B).bfloat16().eval()

    # The modelled time is that of the example: here a prompt of 2048 tokens. Capture takes most of the
    # time, and a third as long with fixed shapes, which are enough to look at a plan.
    example = {"input_ids": torch.zeros(1, 2048, dtype=torch.long), "use_cache": False}
    print("planning ...", flush=True)
    started = time.perf_counter()
    plan = tpcompile.plan(model, 8, example_kwargs=example, dynamic=False, cost_model="h100")
    print(f"... {time.perf_counter() - started:.1f} s\n")
    print(plan)

    # No large matrix is whole anywhere: every rank holds an eighth, and a little for the norms.
    held = plan.layout.fullest
    assert held < 1.01 * plan.model_bytes / plan.ranks
    assert not plan.fallbacks


if __name__ == "__main__":
    if os.environ.get("RANK", "0") == "0":  # started by torchrun, one process does it
        main()

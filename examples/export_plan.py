"""Plans a Llama automatically, and loads it by that plan with plain transformers.

python examples/export_plan.py
torchrun --nproc-per-node 2 examples/export_plan.py
"""

from __future__ import annotations

import json
import os

import torch
import torch.distributed as dist
from launch import launch, say, shared_folder
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

import tpcompile

CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
)


def main() -> None:
    """Runs on every rank."""
    ranks = dist.get_world_size()
    torch.manual_seed(0)
    whole = LlamaForCausalLM(CONFIG).eval()
    words = torch.randint(512, (2, 12), generator=torch.Generator().manual_seed(1))

    rules = tpcompile.to_hf_plan(tpcompile.plan(whole, ranks))
    say(f"the automatic plan in transformers' words:\n{json.dumps(rules, indent=2)}\n")

    with shared_folder() as folder:
        if dist.get_rank() == 0:
            whole.save_pretrained(folder)
        dist.barrier()
        model = load(folder, rules)
    local = model.model.layers[0].mlp.down_proj.weight.to_local()
    say(f"transformers holds {tuple(local.shape)} of a down_proj of (64, 192) on each rank")
    with torch.no_grad():
        value, expected = model(words).logits, whole(words).logits
    error = ((value - expected).abs().max() / expected.abs().max()).item()
    say(f"relative error {error:.1e}")
    assert error <= 1e-5


def load(folder: str, rules: dict[str, str]) -> PreTrainedModel:
    """Plain transformers, no tpcompile; it asks for the package accelerate."""
    os.environ.setdefault("RANK", str(dist.get_rank()))
    os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
    os.environ.setdefault("WORLD_SIZE", str(dist.get_world_size()))
    config = DistributedConfig(tp_size=dist.get_world_size(), tp_plan=rules)
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).eval()


if __name__ == "__main__":
    launch(main)

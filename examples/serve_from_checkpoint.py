"""Serves prompts in batches from a checkpoint on disk: each rank reads its own slices of it.

    python examples/serve_from_checkpoint.py
    torchrun --nproc-per-node 2 examples/serve_from_checkpoint.py

The checkpoint, of a small Llama with random weights, is made first. What the sharded model answers is
compared with what transformers answers, and it is saved again, in several files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from launch import launch, say, shared_folder
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import tpcompile

BATCH, NEW_TOKENS, PAD = 4, 8, 0


def make_checkpoint(folder: str) -> None:
    """What a download would give: config.json, generation_config.json and model.safetensors."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        initializer_range=0.1,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def requests() -> list[list[int]]:
    """Token ids of prompts of several lengths, as a tokenizer would give them."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 1000, (3 + i % 5,), generator=generator).tolist() for i in range(7)]


def batches(prompts: list[list[int]]) -> Iterator[dict[str, Tensor]]:
    """Prompts of the same length class together, filled up on the left."""
    for start in range(0, len(prompts), BATCH):
        some = prompts[start : start + BATCH]
        longest = max(map(len, some))
        filled = [[PAD] * (longest - len(p)) + p for p in some]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in some]
        yield {"input_ids": torch.tensor(filled), "attention_mask": torch.tensor(mask)}


def serve(model: Any) -> list[list[int]]:
    """The new tokens of every prompt, decoded greedily with a cache."""
    answers: list[list[int]] = []
    for batch in batches(requests()):
        tokens = model.generate(**batch, max_new_tokens=NEW_TOKENS, do_sample=False)
        answers += tokens[:, batch["input_ids"].shape[1] :].tolist()
    return answers


def main() -> None:
    """Runs on every rank."""
    logging.disable_progress_bar()
    with shared_folder() as shared:
        load_serve_save(f"{shared}/model", f"{shared}/saved")


def load_serve_save(folder: str, saved: str) -> None:
    """From one folder to the other, with answers between that are compared with transformers' own."""
    if dist.get_rank() == 0:
        make_checkpoint(folder)
    dist.barrier()

    model = tpcompile.from_pretrained(folder, dtype=torch.float32)
    say(f"{str(model.plan).splitlines()[0]}\n")
    answers = serve(model)
    for prompt, answer in zip(requests(), answers, strict=True):
        say(f"{' '.join(map(str, prompt)):24} -> {' '.join(map(str, answer))}")
    say(f"\n{len(answers)} prompts, {len(model.programs)} captured programs")

    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if answers != serve(whole):
        raise RuntimeError("the tokens are not those of the original")
    say("all tokens are those of the original")
    model.save_pretrained(saved, max_shard_size="1.5MB")
    again = AutoModelForCausalLM.from_pretrained(saved).state_dict()
    if not all(torch.equal(again[key], value) for key, value in whole.state_dict().items()):
        raise RuntimeError("the saved weights are not those of the original")
    say(f"saved in {len(list(Path(saved).glob('*.safetensors')))} files, bit by bit the original")


if __name__ == "__main__":
    launch(main)

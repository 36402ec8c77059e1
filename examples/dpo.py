"""Aligns a sharded model with preferences, by TRL's DPOTrainer; the reference is sharded, too.

python examples/dpo.py
torchrun --nproc-per-node 2 examples/dpo.py
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from finetune_lora import QUIET_TRL, losses, paragraphs
from launch import launch, say, shared_folder
from train_with_trainer import build, sources, tokenizer_of
from transformers import PrinterCallback
from trl import DPOConfig, DPOTrainer

import tpcompile


def preferences(pieces: list[str]) -> Dataset:
    """How a piece of source text goes on is preferred to the same backwards."""
    starts, ends = [piece[:20] for piece in pieces], [piece[20:60] for piece in pieces]
    return Dataset.from_dict({"prompt": starts, "chosen": ends, "rejected": [end[::-1] for end in ends]})


def train(folder: str, steps: int, shard: bool = True) -> Any:
    """Trains the model so that what was chosen becomes likelier than what was rejected."""
    texts = sources(3)
    tokenizer = tokenizer_of(texts)
    model, reference = build(len(tokenizer)), build(len(tokenizer))
    if shard:
        model, reference = tpcompile.parallelize(model), tpcompile.parallelize(reference)
    args = DPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        max_length=48,
        **QUIET_TRL,
    )
    data = preferences(paragraphs(texts))
    trainer = DPOTrainer(
        model=model, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def main(steps: int = 20) -> None:
    """Runs on every rank."""
    with shared_folder() as folder:
        trainer = train(folder, steps)
        found = losses(trainer)
        say(f"loss {found[0]:.6f} -> {found[-1]:.6f}")
        margins = [e["rewards/margins"] for e in trainer.state.log_history if "rewards/margins" in e]
        say(f"margin of the chosen texts {margins[0]:.4f} -> {margins[-1]:.4f}")
        assert margins[-1] > margins[0], "the chosen texts must become likelier"


if __name__ == "__main__":
    launch(main)

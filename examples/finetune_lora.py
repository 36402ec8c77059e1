"""Fine-tunes a sharded model with TRL's SFTTrainer: only LoRA's weights are trained, and written.

python examples/finetune_lora.py
torchrun --nproc-per-node 2 examples/finetune_lora.py
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from launch import launch, say, shared_folder
from peft import LoraConfig, PeftModel
from train_with_trainer import QUIET, build, sources, tokenizer_of
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

import tpcompile

# TRL's own defaults are for GPUs.
QUIET_TRL: dict[str, Any] = {**QUIET, "save_strategy": "no", "bf16": False, "gradient_checkpointing": False}


def paragraphs(texts: list[str]) -> list[str]:
    """Short pieces of source text."""
    return [piece for text in texts for piece in text.split("\n\n") if 40 < len(piece) < 160][:64]


def train(folder: str, steps: int, shard: bool = True) -> Any:
    """Trains an adapter in every layer; it is planned with the layers that it is in."""
    texts = sources(3)
    tokenizer = tokenizer_of(texts)
    model = build(len(tokenizer))
    if shard:
        model = tpcompile.parallelize(model)
    args = SFTConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        max_length=32,
        **QUIET_TRL,
    )
    data = Dataset.from_dict({"text": paragraphs(texts)})
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(1)  # the adapter begins with the same numbers on every rank
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def losses(trainer: Any) -> list[float]:
    """The loss of every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(steps: int = 30) -> None:
    """Runs on every rank."""
    with shared_folder() as folder:
        trainer = train(folder, steps)
        found = losses(trainer)
        say(f"loss {found[0]:.6f} -> {found[-1]:.6f}")
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        say(f"{trained:,} parameters were trained")

        # PEFT loads the adapter into a model that is not sharded, bit by bit.
        trainer.save_model()
        loaded = PeftModel.from_pretrained(build(trainer.model.config.vocab_size), folder)
        weights = trainer.model.full_state_dict()
        for name, weight in loaded.state_dict().items():
            if "lora" in name:
                assert torch.equal(weight, weights[name]), name
        say("an ordinary adapter was written")


if __name__ == "__main__":
    launch(main)

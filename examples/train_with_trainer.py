"""Trains a sharded model with transformers' Trainer, on the sources of Python's standard library.

python examples/train_with_trainer.py
torchrun --nproc-per-node 2 examples/train_with_trainer.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from launch import launch, say, shared_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

import tpcompile

LENGTH = 64
QUIET: dict[str, Any] = {
    "logging_steps": 1,
    "report_to": [],
    "disable_tqdm": True,
    "log_level": "error",
    "use_cpu": True,
}
"""What keeps a trainer to CPUs, and to a log that is read afterwards."""


def sources(files: int = 30) -> list[str]:
    """The texts of some modules of the standard library."""
    return [path.read_text("utf-8") for path in sorted(Path(os.__file__).parent.glob("[a-c]*.py"))[:files]]


def tokenizer_of(texts: list[str]) -> Any:
    """A small tokenizer, trained on these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def blocks(tokenizer: Any, texts: list[str]) -> list[dict[str, list[int]]]:
    """Pieces of equal length; a causal model shifts the labels itself."""
    words = [word for text in texts for word in tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]]
    pieces = [words[at : at + LENGTH] for at in range(0, len(words) - LENGTH, LENGTH)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def build(words: int) -> LlamaForCausalLM:
    """The same small model on every rank."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


def train(folder: str, steps: int, shard: bool = True) -> Trainer:
    """Trains the model; that it is sharded concerns nothing but the one line that does it."""
    texts = sources()
    tokenizer = tokenizer_of(texts)
    data = blocks(tokenizer, texts)
    model = build(len(tokenizer))
    if shard:
        model = tpcompile.parallelize(model)
    args = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        save_steps=steps,
        **QUIET,
    )
    trainer = Trainer(
        model=model, args=args, train_dataset=data[:-16], eval_dataset=data[-16:], processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.evaluate()
    return trainer


def losses(trainer: Trainer) -> list[float]:
    """The loss of every step, and the last evaluation's."""
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*found, trainer.state.log_history[-1]["eval_loss"]]


def main(steps: int = 50) -> None:
    """Runs on every rank."""
    with shared_folder() as folder:
        trainer = train(folder, steps)
        for step, loss in enumerate(losses(trainer)[:-1]):
            if step % 10 == 0 or step == steps - 1:
                say(f"step {step:3}  loss {loss:.6f}")
        say(f"evaluation  loss {losses(trainer)[-1]:.6f}")

        # The last checkpoint is an ordinary one.
        saved = LlamaForCausalLM.from_pretrained(Path(folder) / f"checkpoint-{steps}")
        weights = trainer.model.full_state_dict()
        for name, weight in saved.state_dict().items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=0)
        say(
            f"an ordinary checkpoint of {sum(p.numel() for p in saved.parameters()):,} parameters was written"
        )


if __name__ == "__main__":
    launch(main)

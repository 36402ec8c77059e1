"""Draws the losses of the training examples, on two ranks and unsharded, into ``docs/pictures``.

    python -m benchmarks.curves [--steps 50] [--example dpo]

Each example trains twice with the same arguments: as one process, and on two processes over gloo. Needs the
package matplotlib.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
from matplotlib import pyplot

from tests.helpers.run_ranks import run_spmd

ROOT = Path(__file__).parents[1]
EXAMPLES = {
    "train_with_trainer": "transformers' Trainer",
    "finetune_lora": "TRL's SFTTrainer, with LoRA",
    "dpo": "TRL's DPOTrainer",
}


def losses(name: str, steps: int, shard: bool) -> list[float]:
    """The loss of every step of an example, in this process."""
    sys.path.insert(0, str(ROOT / "examples"))
    example = importlib.import_module(name)
    folder = [tempfile.mkdtemp()]
    if dist.is_initialized():
        dist.broadcast_object_list(folder)
    found: list[float] = example.losses(example.train(folder[0], steps, shard=shard))
    return found[:steps]


def draw(name: str, title: str, whole: list[float], sharded: list[float]) -> None:
    """Writes a picture of both curves."""
    worst = max(abs(a - b) for a, b in zip(whole, sharded, strict=True))
    pyplot.rcParams["svg.hashsalt"] = name  # the same picture for the same numbers
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    steps = range(1, len(whole) + 1)
    axes.plot(steps, whole, color="#f2a65a", linewidth=5, label="unsharded")
    axes.plot(steps, sharded, color="#1f4e79", linewidth=1.5, label="two ranks")
    axes.set(title=f"{title}: at most {worst:.0e} apart", xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(ROOT / "docs" / "pictures" / f"{name}.svg", metadata={"Date": None})


def main() -> None:
    """Trains and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--example", choices=EXAMPLES, action="append")
    given = parser.parse_args()
    steps = given.steps
    for name in given.example or EXAMPLES:
        (whole,) = run_spmd(losses, 1, name, steps, False, timeout=1200)
        sharded = run_spmd(losses, 2, name, steps, True, timeout=1200)[0]
        draw(name, EXAMPLES[name], whole, sharded)
        print(f"| {name} | {whole[-1]:.6f} | {sharded[-1]:.6f} |", flush=True)


if __name__ == "__main__":
    main()

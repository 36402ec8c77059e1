"""Pins the placement of one layer, asks the plan for its reasons, and uses it again from a file.

python examples/pin_a_layer.py
torchrun --nproc-per-node 2 examples/pin_a_layer.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from launch import launch, say
from torch import Tensor, nn
from torch.nn.functional import gelu

import tpcompile


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(gelu(self.up(x)))


class Classifier(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(64, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def build() -> Classifier:
    """The same model on every rank."""
    torch.manual_seed(0)
    return Classifier().eval()


def main() -> None:
    """Runs on every rank."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    expected = build()(x)

    # A key is a glob of modules or parameters. The rest of the model is planned around the pins.
    # "colwise" and "rowwise" would do as well, as would torch.distributed.tensor's Shard and Replicate.
    pins = {"head": "replicate", "blocks.1.up": "rowwise"}
    model = tpcompile.parallelize(build(), example_args=(x,), plan=pins)
    say(f"{model.plan}\n")
    check(model(x), expected)

    say("why is the first block divided as it is, and what would the alternatives have cost?\n")
    say(f"{model.plan.explain('blocks.0')}\n")
    say(f"and the layer that was pinned:\n\n{model.plan.explain('blocks.1.up')}\n")

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "plan.json")
        model.plan.save(path)
        plan = tpcompile.Plan.load(path)
        say(f"saved and loaded: {path.stat().st_size} bytes of JSON")
    again = tpcompile.parallelize(build(), example_args=(x,), plan=plan)
    assert again.get_parameter("head.weight").shape == (128, 64)  # whole, as it was pinned
    assert again.plan.decisions == model.plan.decisions
    check(again(x), expected)


def check(value: Tensor, expected: Tensor) -> None:
    """Compares with the unsharded model."""
    error = ((value - expected).abs().max() / expected.abs().max()).item()
    say(f"relative error {error:.1e}\n")
    assert error <= 1e-5


if __name__ == "__main__":
    launch(main)

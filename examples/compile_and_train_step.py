"""Trains a sharded model under torch.compile, beside the unsharded one: the losses are the same.

python examples/compile_and_train_step.py
torchrun --nproc-per-node 2 examples/compile_and_train_step.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from launch import launch, say
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import tpcompile


def build() -> nn.Module:
    """The same model on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(100, 32), nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32), nn.Linear(32, 10)
    )


def train(step: Callable[[Tensor], Tensor], model: nn.Module, words: Tensor, labels: Tensor) -> list[float]:
    """The loss before and after one step. A rank's optimizer only sees the slices that it holds."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    before = cross_entropy(step(words).flatten(0, 1), labels.flatten())
    before.backward()
    optimizer.step()
    after = cross_entropy(step(words).flatten(0, 1), labels.flatten())
    return [before.item(), after.item()]


def main() -> None:
    """Runs on every rank."""
    torch.manual_seed(1)
    words, labels = torch.randint(100, (4, 16)), torch.randint(10, (4, 16))

    reference = build()
    expected = train(reference, reference, words, labels)

    model = build()
    whole = sum(p.numel() for p in model.parameters())
    sharded = tpcompile.parallelize(model, example_args=(words,))
    held = sum(p.to_local().numel() for p in sharded.parameters())
    say(f"this rank holds {held} of {whole} parameters")

    compiled = torch.compile(sharded, fullgraph=True)  # no graph breaks: collectives are in the graph
    say("compiling and taking one step ...")
    started = time.perf_counter()
    losses = train(compiled, sharded, words, labels)
    say(f"... {time.perf_counter() - started:.1f} s")

    say(f"unsharded: loss {expected[0]:.6f} -> {expected[1]:.6f}")
    say(f"sharded:   loss {losses[0]:.6f} -> {losses[1]:.6f}")
    assert losses[1] < losses[0], "the loss must fall"
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)

    # The weights after the step, gathered, are those of the unsharded model.
    gathered = sharded.full_state_dict()
    for name, weight in reference.state_dict().items():
        torch.testing.assert_close(gathered[name], weight, rtol=1e-4, atol=1e-6)
    say("the weights after the step agree as well")


if __name__ == "__main__":
    launch(main)

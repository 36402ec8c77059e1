"""What the ranks do in ``test_training_ways``: twenty steps of AdamW, in every way to train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import tpcompile
from tests.on_ranks.axes import Toy
from tests.on_ranks.models import mesh

STEPS = 20
WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "checkpointing": {"checkpointing": "full"},
    "selective": {"checkpointing": "selective"},
    "sequence": {"sequence_parallel": True},
    "both": {"checkpointing": "full", "sequence_parallel": True},
}
"""Options of ``parallelize``. The ranks share the vocabulary of the toy's loss. To compile takes too long
here: ``benchmarks/training_matrix.py`` does."""


def toy() -> Toy:
    """A vocabulary that two ranks do not divide evenly."""
    return Toy(words=25).double()


def batch(step: int) -> Tensor:
    """Token ids of other lengths in every step."""
    return torch.randint(25, (3, 5 + step % 2), generator=torch.Generator().manual_seed(step))


def losses(model: nn.Module) -> Tensor:
    """The losses of all steps."""
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(STEPS):
        loss = model(batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


def differences() -> dict[str, tuple[float, float]]:
    """How far losses and weights are from the unsharded model's."""
    whole = toy()
    expected, found = losses(whole), {}
    for name, options in WAYS.items():
        model: Any = tpcompile.parallelize(toy(), mesh(), (batch(0),), **options)
        apart = (losses(model) - expected).abs().max()
        weights = model.full_state_dict()
        worst = max(float((weights[n] - p).abs().max()) for n, p in whole.state_dict().items())
        found[name] = (float(apart), worst)
    return found

"""Teaches tpcompile an operator that it has never seen, with one line.

python examples/custom_rule.py
torchrun --nproc-per-node 2 examples/custom_rule.py
"""

from __future__ import annotations

import torch
from launch import launch, say
from torch import Tensor, nn

import tpcompile


@torch.library.custom_op("examples::smooth", mutates_args=())
def smooth(x: Tensor, decay: Tensor) -> Tensor:
    """A moving average over time, with a decay per channel; imagine a fast kernel here."""
    out, state = torch.empty_like(x), torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        state = decay * state + (1 - decay) * x[:, t]
        out[:, t] = state
    return out


@smooth.register_fake
def _(x: Tensor, decay: Tensor) -> Tensor:
    return torch.empty_like(x)


class Mixer(nn.Module):
    """Expands, smooths over time, contracts."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(48, 192)
        self.decay = nn.Parameter(torch.rand(192))
        self.down = nn.Linear(192, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(smooth(self.up(x), self.decay))


@torch.no_grad()
def main() -> None:
    """Runs on every rank."""
    torch.manual_seed(0)
    model, x = Mixer().eval(), torch.randn(2, 9, 48)
    expected = model(x)

    # Without a rule the operator gets whole operands on every rank. That is right, but it costs a
    # gather, and the plan says so.
    before = tpcompile.plan(model, 2, (x,))
    say(f"{before}\n")
    assert before.fallbacks

    # Batch, time and channel go from x to the result, the channel of decay is the same channel; a rank
    # must see all of time, and the operator is linear in x: a sum of parts passes through it.
    tpcompile.register_rule("examples.smooth", "b t c, c -> b t c; whole t; linear 0")

    sharded = tpcompile.parallelize(model, example_args=(x,))
    say(f"{sharded.plan}\n")
    assert not sharded.plan.fallbacks
    assert sum(c.count for c in sharded.plan.collectives) < sum(c.count for c in before.collectives)

    error = ((sharded(x) - expected).abs().max() / expected.abs().max()).item()
    held = list(sharded.get_parameter("decay").to_local().shape)
    say(f"relative error {error:.1e}; each rank smooths {held} channels")
    assert error <= 1e-5


if __name__ == "__main__":
    launch(main)

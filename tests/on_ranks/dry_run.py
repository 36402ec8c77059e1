"""What steps take on ranks: functions that travel to the processes by their import path."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import tpcompile
from benchmarks.predicted import Taken, generating, training

BATCH, LENGTH = 3, 20
X = torch.ones(BATCH, LENGTH, 24)


class Layer(nn.Module):
    """A residual layer with a packed projection, of unequal parts, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.both = nn.Linear(24, 40 + 40)
        self.down = nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(self.norm(x)).chunk(2, -1)
        result: Tensor = x + self.down(F.silu(gate) * up)
        return result


class Deep(nn.Module):
    """So many layers that most are left out when it is captured; its result is a loss."""

    def __init__(self, layers: int = 7) -> None:
        super().__init__()
        self.first = nn.Linear(24, 24)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.first.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def llama() -> nn.Module:
    """A small one with fewer key heads than query heads, and so many layers that most are left out."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=56,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=5,
        vocab_size=80,
    )
    return LlamaForCausalLM(config).eval()


def taken() -> dict[str, Taken]:
    """What the steps of both models take on this rank."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))

    def trained(layers: int, **options: Any) -> tuple[float, str]:
        deep: Any = tpcompile.parallelize(Deep(layers), mesh, (X,), **options)
        return training(deep, lambda: deep(X), X, ranks)

    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    with torch.no_grad():  # the first program is that of the prompt
        prompt = {"input_ids": ids, "use_cache": True}
        generates: Any = tpcompile.parallelize(llama(), mesh, example_kwargs=prompt)
    found = generating(generates, ids, ranks)

    def loss() -> Tensor:
        result: Tensor = generates(input_ids=ids, labels=ids, use_cache=False).loss
        return result

    return {
        "deep": {
            "train": trained(7),
            "selective": trained(7, checkpointing="selective"),
            "divided": trained(7, sequence_parallel=True),
        },
        "short": {"full": trained(2, checkpointing="full")},
        "llama": {**found, "train": training(generates, loss, ids, ranks)},
    }

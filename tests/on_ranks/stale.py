"""What a model computes also follows from what no look at the model itself can tell."""

from __future__ import annotations

import os
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import tpcompile
from tests.on_ranks.models import mesh

elsewhere = types.ModuleType("elsewhere")
elsewhere.__dict__.update(SHIFT=1.0, scale=lambda x: x * 2.0)


class Surrounded(nn.Module):
    """Reads functions and constants of other modules, and the environment."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(12, 32), nn.Linear(32, 12)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.up(x)) * float(os.environ.get("TPCOMPILE_TEST_SCALE", "1"))
        return elsewhere.scale(self.down(hidden)) + elsewhere.SHIFT


def changes(folder: str) -> dict[str, float]:
    """On a rank: the error of a model that is sharded anew after each change, with plans kept in a folder."""
    every: dict[str, Callable[[], AbstractContextManager[object]]] = {
        "none": lambda: patch.dict(os.environ),
        "environment": lambda: patch.dict(os.environ, TPCOMPILE_TEST_SCALE="3"),
        "constant": lambda: patch.object(elsewhere, "SHIFT", 5.0),
        "function": lambda: patch.object(elsewhere, "scale", lambda x: x * 4.0),
        "torch": lambda: patch.object(F, "silu", torch.tanh),
        "method": lambda: patch.object(nn.Linear, "forward", _doubled),
    }
    return {name: _error(folder, change) for name, change in every.items()}


def _doubled(self: nn.Linear, x: Tensor) -> Tensor:
    return 2 * F.linear(x, self.weight, self.bias)


def _error(folder: str, change: Callable[[], AbstractContextManager[object]]) -> float:
    x = torch.linspace(-1, 1, 60).reshape(1, 5, 12)
    kept = patch.dict(os.environ, TPCOMPILE_CACHE="1", TPCOMPILE_CACHE_DIR=folder)
    with kept, change(), torch.no_grad():
        whole = Surrounded()(x)
        sharded = tpcompile.parallelize(Surrounded(), mesh(), (x,))(x)
    return float((sharded - whole).abs().max())


class Random(nn.Module):
    """Draws a tensor of its own that is not a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.noise = nn.Linear(12, 12), torch.randn(12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x + self.noise)
        return y


def unlike_constants() -> str:
    """On a rank: the error where ranks have drawn different tensors."""
    model = Random()
    model.noise += dist.get_rank()
    try:
        tpcompile.parallelize(model, mesh(), (torch.ones(1, 5, 12),))
    except tpcompile.TpCompileError as error:
        return str(error)
    return "no error"

"""What the ranks do in ``test_value_checks``: models that check values, and calls that do not pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.import_utils import torch_compilable_check

import tpcompile
from tests.helpers.toys import Mlp
from tests.on_ranks.models import mesh
from tests.on_ranks.module_life import refusal


class Checks(nn.Module):
    """Checks its argument, what its first layer computes, which is divided, and a count; it counts calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.mlp = nn.Linear(12, 20), Mlp(20, 36)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        torch_compilable_check(x < 50, "x is large")
        y = self.up(x)
        torch._assert_async((y > -30).all(), "y is small")
        torch._check((x == 0).sum().item() * 2 < x.shape[-1])
        z: Tensor = self.mlp(y)
        return z


class Layer(nn.Module):
    """Checks in each of its kind."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.mlp, self.limit = Mlp(), nn.Parameter(torch.tensor(limit), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert_async((x < self.limit).all(), "a layer's")
        y: Tensor = self.mlp(x)
        return y


def bad_calls() -> dict[str, Tensor]:
    """Arguments of ``Checks`` by the check that they do not pass."""
    x = torch.rand(3, 12) + 0.1
    model = Checks()
    down = -40 * model.up.weight[15].sign().detach()
    return {
        "value_checks.py": x.index_fill(0, torch.tensor([1]), 60.0),
        "y is small": down.repeat(2, 1),
        ", in forward": x * 0,
    }


def _told(way: Callable[[Tensor], Any], bad: Tensor) -> str:
    try:
        way(bad)
    except RuntimeError as error:  # in compiled code torch's own, not by us
        return str(error)
    return "accepted"


def checks(folder: str) -> dict[str, Any]:
    """What bad calls are told by the model, compiled, and by the program that was saved."""
    x, found = torch.rand(3, 12) + 0.1, dict[str, Any]()
    sharded: Any = tpcompile.parallelize(Checks().eval(), mesh(), (x,))
    with torch.no_grad():
        wanted = sharded(x)
        sharded.save_program(folder)
        loaded = tpcompile.load_program(folder, mesh())
        compiled = torch.compile(sharded, backend="eager", fullgraph=True)
        ways: dict[str, Callable[[Tensor], Any]] = {"model": sharded, "saved": loaded, "compiled": compiled}
        for name, way in ways.items():
            found[name] = {said: _told(way, bad) for said, bad in bad_calls().items()}
            found[f"{name} after"] = torch.equal(way(x), wanted)
    found["calls"] = int(sharded.calls), int(loaded.tensors["calls"])
    layers = nn.Sequential(*(Layer(limit) for limit in (90.0, 90.0, 90.0, 90.0, 50.0, 90.0))).eval()
    stack = tpcompile.parallelize(layers, mesh(), (x,))
    found["layers"] = refusal(lambda: stack(x.index_fill(1, torch.tensor([0]), 70.0)))
    return found

"""What the ranks do in ``test_verify_live``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import tpcompile
from tests.helpers import families
from tests.helpers.toys import Mlp
from tests.on_ranks.models import mesh
from tests.on_ranks.module_life import refusal
from tpcompile.runtime.program import RankProgram
from tpcompile.runtime.verify.report import Report


class Counted(nn.Module):
    """An MLP with a buffer that it writes."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.last = Mlp(), nn.LayerNorm(12)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        y: Tensor = self.last(self.mlp(x))
        return y


def _counted() -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 12, dtype=torch.float64)
    return tpcompile.parallelize(Counted().double(), mesh(), (x,)), x


def live() -> dict[str, Any]:
    """Reports of a sharded model as it is, with something wrong, and of different calls."""
    model, x = _counted()
    rank = dist.get_rank()
    found: dict[str, Any] = {"right": model.verify((x,)), "seen": float(model.seen)}
    found["gradients left"] = [p.grad for p in model.parameters() if p.grad is not None]
    found["later"] = _later(model, x)
    right = RankProgram._plain
    if rank == 1:
        RankProgram._plain = _a_little_more(right)  # type: ignore[method-assign]
    found["wrong on one rank"] = model.verify((x,), gradients=False)
    RankProgram._plain = right  # type: ignore[method-assign]
    model.register_forward_hook(lambda module, args, result: result * (1 + rank))
    found["hook on one rank"] = model.verify((x,), gradients=False)
    for name, call in (
        ("other values", lambda: model.verify((x + rank,))),
        ("other gradients", lambda: model.verify((x,), gradients=rank == 0)),
        ("no call", lambda: model.verify()),
        ("no tokens", lambda: model.verify((x,), generate=-1)),
    ):
        found[name] = refusal(call)
    return found


def _later(model: Any, x: Tensor) -> list[Report]:
    """Reports behind a step of an optimizer, and with other weights than those that were divided."""
    model(x).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    grads = [p.grad.to_local().clone() for p in model.parameters()]
    reports = [model.verify((x,))]
    assert all(torch.equal(p.grad.to_local(), g) for p, g in zip(model.parameters(), grads, strict=True))
    model.load_state_dict({name: value / 2 for name, value in model.full_state_dict().items()})
    return [*reports, model.verify((x,))]


def _a_little_more(right: Any) -> Any:
    def plain(program: RankProgram, given: Any) -> Any:
        flat, gathers = right(program, given)
        return [1.001 * result for result in flat], gathers

    return plain


def weights_that_differ() -> str:
    """One rank's copy of a weight that is whole on all is another."""
    model, x = _counted()
    if dist.get_rank() == 1:
        with torch.no_grad():
            model.last.bias.to_local().add_(1)
    return refusal(lambda: model.verify((x,)))


def generating() -> Report:
    """A small model that generates, with its caches."""
    model = families.build("llama", torch.float64, num_hidden_layers=1)
    tpcompile.parallelize(model, mesh())
    report: Report = model.verify(example_kwargs=families.causal_inputs(2, 7), generate=3)
    return report

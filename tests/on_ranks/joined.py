"""What the ranks do in ``test_join_gradients``: gradients of norms that travel together."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import tpcompile
from tests.helpers import toys
from tests.on_ranks.models import error, mesh
from tests.on_ranks.recompute import Calls

X = torch.randn(3, 7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _gradients(whole: nn.Module, sharded: nn.Module) -> tuple[float, list[str]]:
    """The worst error of a gradient; the parameters without one, which must be the same ones."""
    theirs, mine = (dict(model.named_parameters()) for model in (whole, sharded))
    missing = [[name for name, p in each.items() if p.grad is None] for each in (theirs, mine)]
    assert missing[0] == missing[1], missing
    pairs: list[Any] = [(mine[n].grad, p.grad) for n, p in theirs.items() if p.grad is not None]
    return max(error(own.full_tensor(), full) for own, full in pairs), missing[0]


def ways() -> dict[str, Any]:
    """Errors, what has no gradient, and the all-reduces of backward, in several ways to train."""
    torch.manual_seed(0)
    start = toys.Blocks().double()
    start.second.bias.requires_grad_(False)
    found = {}
    options: dict[str, dict[str, Any]] = {
        "eager": {},
        "recomputed": {"checkpointing": "full"},
        "compiled": {"compile": {"backend": "aot_eager"}},
        "compiled around": {},
    }
    for name, asked in options.items():
        whole = copy.deepcopy(start)
        sharded: Any = tpcompile.parallelize(
            copy.deepcopy(start), mesh(), (X,), sequence_parallel=True, **asked
        )
        compiled = name.startswith("compiled")  # what has no gradient has zeros then
        parts = {"both": (0, 1)} if compiled else {"both": (0, 1), "one": (1,)}
        run = sharded
        if name == "compiled around":
            run = torch.compile(sharded, fullgraph=True, backend="aot_eager")
        for result, used in parts.items():
            for model in (whole, sharded):
                model.zero_grad()
            results = whole(X), run(X)
            losses = [torch.stack([each[at].square().sum() for at in used]).sum() for each in results]
            losses[0].backward()
            with Calls() as calls:
                losses[1].backward()
            found[f"{name}, {result}"] = (*_gradients(whole, sharded), calls.counts["all_reduce"])
    return found


class TwoResults(nn.Module):
    """Two small results, whose sums over the ranks travel together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = toys.Mlp(), toys.Mlp()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first(x), self.second(x)


def one_of_two() -> tuple[int, float, list[str]]:
    """A loss of one result: all-reduces of the forward, the worst gradient's error, and what has none."""
    torch.manual_seed(0)
    whole = TwoResults().double()
    sharded: Any = tpcompile.parallelize(copy.deepcopy(whole), mesh(), (X,))
    with Calls() as calls:
        result = sharded(X)[1]
    for each in (result, whole(X)[1]):
        each.square().sum().backward()
    return (calls.counts["all_reduce"], *_gradients(whole, sharded))

"""One rank captures for all of them, where they hold the same model."""

from __future__ import annotations

import copy
import os
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import tpcompile
from tests.helpers.run_ranks import run_spmd
from tests.helpers.toys import Mlp
from tests.on_ranks.models import mesh
from tpcompile.capture.repeats.capture_repeated import capture_repeated
from tpcompile.capture.store import store_capture

X = torch.arange(2 * 5 * 12.0).reshape(2, 5, 12) / 50


class Branches(nn.Module):
    """Cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


def captures(kind: str) -> tuple[int, float]:
    """How often this rank captured, and the error of the sharded model."""
    torch.manual_seed(0)
    model = Mlp().eval()
    if kind == "hooked":  # no description covers what a hook does
        model.up.register_forward_hook(lambda _module, _args, _result: None)
    whole = copy.deepcopy(model)
    count = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return capture_repeated(*args, **kwargs)

    def spoiled(_captured: Any) -> None:
        return None

    sent = spoiled if kind == "unsendable" else store_capture.try_dump
    with (
        patch.dict(os.environ, TPCOMPILE_CACHE="0"),
        patch.object(store_capture, "capture_repeated", counted),
        patch("tpcompile.capture.store.share_capture.try_dump", sent),
    ):
        tpcompile.parallelize(model, mesh(), (X,))
    with torch.no_grad():
        return count, float((model(X) - whole(X)).abs().max())


@pytest.mark.parametrize(
    ("kind", "expected"), [("plain", [1, 0]), ("hooked", [1, 1]), ("unsendable", [1, 1])]
)
def test_who_captures(kind: str, expected: list[int]) -> None:
    counts, errors = zip(*run_spmd(captures, 2, kind), strict=True)
    assert list(counts) == expected
    assert max(errors) < 1e-5


def refusal() -> str:
    with pytest.raises(tpcompile.TpCompileError) as caught:
        tpcompile.parallelize(Branches(), mesh(), (X,))
    dist.barrier()  # nobody was left behind
    return str(caught.value)


def test_all_ranks_are_told_why_it_failed() -> None:
    for message in run_spmd(refusal, 2):
        assert "if x.sum() > 0" in message

"""Plans on disk: found again in another process, and never where what they follow from has changed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import tpcompile
from tests.helpers.run_ranks import run_spmd
from tests.helpers.toys import Mlp, Rearranged
from tests.on_ranks.stale import changes, unlike_constants
from tpcompile.planner import store_plan
from tpcompile.planner.search.cost import PRESETS, CostModel

X = torch.arange(2 * 5 * 12.0).reshape(2, 5, 12) / 50


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that is on."""
    path = tmp_path / "cache"
    monkeypatch.setenv("TPCOMPILE_CACHE", "1")
    monkeypatch.setenv("TPCOMPILE_CACHE_DIR", str(path))
    return path


def no_planning(*_: Any, **__: Any) -> NoReturn:
    """Stands in the place of the planner."""
    raise AssertionError("planned again")


def plans() -> str:
    """Plans of two models."""
    return json.dumps([tpcompile.plan(model.eval(), 2, (X,)).to_json() for model in (Mlp(), Rearranged())])


def again(path: str) -> str:
    """In another process: the same plans once more, without planning."""
    with (
        patch.dict(os.environ, TPCOMPILE_CACHE="1", TPCOMPILE_CACHE_DIR=path),
        patch("tpcompile.pipeline.plan_program", no_planning),
    ):
        return plans()


def test_another_process_finds_plans(folder: Path) -> None:
    first = plans()
    assert len(list(folder.iterdir())) == 2
    assert run_spmd(again, 2, str(folder)) == [first, first]


class Shifted(nn.Module):
    """Its graph has a constant."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.linear, self.shift = nn.Linear(12, 12), torch.tensor([shift, 1.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.shift.sum()


@dataclass(frozen=True)
class Own(CostModel):
    """A user's cost model: its representation does not say what its methods do."""


def test_plans_are_kept_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = Mlp()

    def kept(model: nn.Module = mlp, ranks: int = 2, x: Tensor = X, **options: Any) -> int:
        before = len(list(folder.glob("*")))
        tpcompile.plan(model, ranks, (x,), **options)
        return len(list(folder.glob("*"))) - before

    assert kept() == 1
    assert kept() == 0
    # Of another example the graph may be the same, but the times that are compared are not.
    assert kept(x=torch.cat([X, X])) == 1
    assert kept(ranks=4) == 1
    assert kept(cost_model="cpu") == 1
    assert kept(plan={"up": "replicate"}) == 1
    assert kept(memory=1e9) == 1
    assert kept(Shifted(1.0)) == 1
    assert kept(Shifted(2.0)) == 1
    assert kept(Shifted(1.0)) == 0
    for module, name, value in (
        (torch, "__version__", "1.0"),
        (store_plan, "own_sources", lambda: "others"),
        (tpcompile.rules.table, "_USER", {"made.up": "a -> a"}),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(module, name, value)
            assert kept() == 1, name
            assert kept() == 0, name
    assert kept() == 0


def test_plans_that_follow_from_code_of_the_users_are_not_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Own(**vars(replace(PRESETS["cpu"], name="own")))
    tpcompile.plan(Mlp(), 2, (X,), cost_model=own)
    monkeypatch.setattr(tpcompile.rules.table, "_USER", {"made.up": lambda node: "none"})
    tpcompile.plan(Mlp(), 2, (X,))
    assert not folder.exists() or not list(folder.iterdir())


@pytest.mark.parametrize("value", ["0", "off"])
def test_it_can_be_switched_off(folder: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPCOMPILE_CACHE", value)
    tpcompile.plan(Mlp(), 2, (X,))
    assert not folder.exists()


def test_no_change_of_a_models_surroundings_is_missed(folder: Path) -> None:
    for errors in run_spmd(changes, 2, str(folder)):
        assert max(errors.values()) < 1e-5, errors
    for message in run_spmd(unlike_constants, 2):
        assert "the ranks have different constants" in message

"""What a plan says of the proof of its program."""

from __future__ import annotations

import pytest
import torch

import tpcompile
from tests.helpers import toys
from tpcompile.planner.plan import Plan
from tpcompile.rules import table


def test_plan_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tpcompile.plan(toys.Mlp(), 2, (torch.randn(2, 4, 12),))
    proof = plan.proof
    assert proof is not None
    assert proof.training
    assert proof.collectives == {"copy_to_ranks": 1, "all_reduce": 1, "keep_first": 1}
    assert proof.rules["aten.linear"] == 2
    assert proof.head in str(plan)
    assert "2 x aten.linear" in str(proof)
    assert plan.timings["proof"] == proof.seconds
    assert Plan.from_json(plan.to_json()).proof is None
    monkeypatch.setattr(table, "_USER", {"mylib.smooth": "b t c, c -> b t c"})
    other = tpcompile.plan(toys.Mlp(), 2, (torch.randn(2, 4, 12),)).proof
    assert other is not None
    assert other.version != proof.version

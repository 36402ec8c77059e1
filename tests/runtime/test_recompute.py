"""Layers that are recomputed in backward: the same gradients from less memory, with their collectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import tpcompile
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import recompute as on_ranks

PIECE = 4 * 6 * on_ranks.WIDE * 8  # bytes of what blocks hand on


def test_every_way_to_ask_for_it() -> None:
    for found in run_spmd(on_ranks.ways, 2):
        hand = found.pop("by hand")["kept"]
        assert hand == 4 * PIECE  # what goes into the first layer and into the three blocks
        for name, one in found.items():
            assert max(one["errors"]) < 1e-11, name
            assert bool(one["text"]) == (name != "not"), name
            if name not in ("not", "with sequence parallelism"):
                assert one["kept"] <= 1.1 * hand, found
        kept, calls = ({name: one[what] for name, one in found.items()} for what in ("kept", "calls"))
        assert 2 * kept["full"] < kept["not"] and kept["with sequence parallelism"] < kept["full"], kept
        none, full = calls["not"], calls["full"]
        assert none == {"addmm": 0, "gelu": 0, "all_reduce": none["all_reduce"]}, calls
        assert full == {"addmm": full["addmm"], "gelu": 3, "all_reduce": none["all_reduce"] + 3}, calls
        assert full["addmm"] >= 3 and calls["own"] == full, calls
        assert calls["selective"] == none | {"gelu": 3}, calls
        assert calls["by name"] == full | {"gelu": 0, "all_reduce": none["all_reduce"]}, calls
        assert calls["by policy"] == full | {"gelu": 0}, calls
        assert found["full"]["text"] == found["own"]["text"] == ["recomputed in backward: blocks.* (3)"]
        assert found["by name"]["text"][0].endswith("but for results of all_reduce, gelu")


def test_compiled() -> None:
    for found in run_spmd(on_ranks.compiled, 2, timeout=300):
        assert all(one["gradients"] < 1e-11 for one in found.values()), found
        kept = {name: one["kept"] for name, one in found.items()}
        assert kept["full"] <= 1.1 * 5 * PIECE and 2 * kept["full"] < kept["not"], kept
        assert kept["full, each program"] <= kept["full"] < kept["selective"] < kept["not"], kept
        assert kept["within a budget"] < 0.8 * kept["not"], kept


def test_the_same_random_numbers() -> None:
    for found in run_spmd(on_ranks.dropout, 2):
        assert found["error"] < 1e-12 and found["largest"] > 0.1


def test_statistics_are_written_once() -> None:
    assert max(run_spmd(on_ranks.statistics, 2)) < 1e-11


@pytest.mark.parametrize("after", [False, True])
def test_the_switch_of_transformers(after: bool) -> None:
    for found in run_spmd(on_ranks.switched, 2, after):
        assert found["gradients"] < 1e-11, found
        assert found["kept"]["on"] <= 1.1 * found["kept"]["unsharded"], found
        assert found["programs"] == 1 + after  # not layer by layer
        assert found["text"] == ["recomputed in backward: model.layers.* (4)"]
        if after:
            assert 2 * found["kept"]["on"] < found["kept"]["off"]


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ("some", "checkpointing"),
        ([], "checkpointing"),
        (["nonsense"], "there is no operator 'nonsense'"),
        (["aten.mm.nonsense"], "there is no operator"),
        ([torch.ops.aten.layer_norm.default], "autograd does not see aten.layer_norm"),
    ],
)
def test_refused(asked: Any, what: str) -> None:
    with pytest.raises(tpcompile.TpCompileError, match=what):
        tpcompile.plan(on_ranks.Tower(), 2, (torch.zeros(on_ranks.X).double(),), checkpointing=asked)


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(tpcompile.TpCompileError, match="no list of layers"):
        tpcompile.plan(nn.Linear(4, 4), 2, (torch.zeros(2, 4),), checkpointing="full")

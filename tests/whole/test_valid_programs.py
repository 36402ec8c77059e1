"""Programs that are valid and hard to divide are divided otherwise, or not at all, and say so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tpcompile
from tests.helpers.run_ranks import run_spmd
from tests.helpers.toys import Mlp
from tests.on_ranks import valid_programs


def test_what_does_not_run_on_parts_is_whole() -> None:
    for notes in run_spmd(valid_programs.refused_by_operators, 2):
        assert [note.partition(":")[0] for note in notes] == [
            "valid.whole_only.default",
            "valid.not_three.default",
        ]
        assert all("does not run on a rank's part: not of this shape" in note for note in notes)


def test_groups_of_channels_that_are_split_otherwise() -> None:
    run_spmd(valid_programs.channels_split_otherwise, 2)


def test_means_over_dynamic_and_divided_dimensions() -> None:
    for collectives in run_spmd(valid_programs.means, 2):
        assert "all_gather" not in collectives


def test_later_calls_that_cannot_use_the_layout() -> None:
    for notes in run_spmd(valid_programs.later_calls, 2):
        gathered = {way for way, said in notes.items() if said}
        assert gathered == {"sorted", "on its own", "in one piece", "cut elsewhere", "its values"}
        assert all("is gathered for this call" in note for said in notes.values() for note in said)


def test_weights_in_buffers_and_joined_ones_are_divided_others_are_reported() -> None:
    for notes, divided in run_spmd(valid_programs.weights_elsewhere, 2):
        told = [note.partition(" ")[0] for note in notes if "whole on every rank" in note]
        assert sorted(told) == ["derived", "plain"]
        buffers = {note.partition(" ")[0] for note in notes if "a DTensor" in note}
        assert "weight" in buffers and buffers <= set(divided)
        assert {"weight", "table", "one", "other", "bilinear.weight", "bag.weight"} <= set(divided)


class _Quantised(nn.Module):
    """Two layers of numbers of four and of eight bits, with scales of groups and of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("packed", torch.randint(0, 255, (32, 6), dtype=torch.uint8))
        self.register_buffer("groups", torch.rand(32, 3, 1, dtype=torch.float64))
        self.register_buffer("small", torch.randn(12, 32).to(torch.float8_e4m3fn))
        self.register_buffer("scale", torch.rand(12, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(1).to(x.dtype) - 8
        first = (halves.view(32, 3, 4) * self.groups).flatten(1)
        return F.linear(F.silu(F.linear(x, first)), self.small.to(x.dtype) * self.scale)


def test_quantised_layers_are_divided_as_others() -> None:
    x = torch.randn(3, 12, dtype=torch.float64)
    plan = tpcompile.plan(_Quantised(), 2, (x,))
    assert [c.kind for c in plan.collectives] == ["all_reduce"]
    assert not any(plan.layout.params[name].is_whole for name in ("packed", "small"))
    assert tpcompile.verify(_Quantised(), 3, (x,)).ok


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_whole_and_reported(kind: type[nn.Module]) -> None:
    (told,) = tpcompile.plan(kind(6, 8), 2, (torch.randn(3, 4, 6),)).fallbacks
    assert told.startswith(f"aten.{kind.__name__.lower()}.input: replicated")
    assert "whole at every time step" in told


class _Checked(nn.Module):
    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mlp, self.op = Mlp(), op

    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp(x)
        return self.op(h @ h.transpose(-1, -2))


@pytest.mark.parametrize("op", [torch.linalg.inv, torch.linalg.cholesky])
def test_operators_that_check_what_they_compute(op: Callable[[Tensor], Tensor]) -> None:
    plan = tpcompile.plan(_Checked(op), 2, (torch.randn(3, 5, 12),))
    assert any(f"aten.{op.__name__}" in line for line in plan.fallbacks)

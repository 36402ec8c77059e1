"""Programs that are valid and hard to divide are divided otherwise, or not at all, and say so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

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


def test_weights_that_are_not_divided_are_reported() -> None:
    for notes, divided in run_spmd(valid_programs.whole_weights, 2):
        told = [note.partition(" ")[0] for note in notes if "whole on every rank" in note]
        assert sorted(told) == ["one", "other", "packed", "plain", "table", "weight"]
        assert {"bilinear.weight", "bag.weight"} <= set(divided)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_are_whole_and_reported(kind: type[nn.Module]) -> None:
    (told,) = tpcompile.plan(kind(6, 8), 2, (torch.randn(3, 4, 6),)).fallbacks
    assert told.startswith(f"aten.{kind.__name__.lower()}.input: replicated")


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

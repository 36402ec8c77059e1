"""Rows of a table that is divided by rows: the numbers that choose them are read as torch reads indices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import programs
from tpcompile.pipeline import rewrite


class _Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 6))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids] * 2


def test_rows_are_counted_from_either_end() -> None:
    model, ids = _Chooses(), torch.tensor([3, -1, 0, -8, 5])
    program = programs.planned(model, ids)
    assert [str(d.params[n]) for d in program.decisions for n in d.params] == ["S(0)"]
    rewrite(program, training=False)
    for (found,) in programs.run_ranks(program, model, ids):
        torch.testing.assert_close(found, model(ids))
    for beyond in (8, -9, -16):
        with pytest.raises(IndexError):
            programs.run_ranks(program, model, torch.tensor([3, 1, 0, beyond, 5]))

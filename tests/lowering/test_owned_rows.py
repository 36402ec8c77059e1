"""Rows of a table that is divided by rows: the numbers that choose them are read as torch reads indices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from tests.helpers import programs
from tests.whole.test_expert_parallel import Experts
from tpcompile.ir.placements import Placement, Shard
from tpcompile.pipeline import canonical, rewrite
from tpcompile.planner.decide import plan_on_axes
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.planner.search.cost import PRESETS


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


DIMS = {"gate_up_proj": (0, 1), "gate_up_proj_bias": (0, 1), "down_proj": (0, 2)}


@pytest.mark.parametrize("grouped", [False, True], ids=["batched", "grouped"])
def test_experts_are_divided_within_on_another_sub_axis(grouped: bool) -> None:
    """Two of four experts on each half of the ranks, and halves of them on each rank."""

    def pins(program: GlobalProgram, axis: int) -> dict[Node, frozenset[Placement]]:
        factors, params = program.factors(), program.params()
        return {
            node: frozenset(Shard(*place) for place in factors.places(node) if place[0] == DIMS[name][axis])
            for node, name in params.items()
            if name in DIMS
        }

    model, x = Experts(grouped, experts=4, inner=6).double(), torch.randn(9, 12, dtype=torch.float64)
    captured = programs.captured(model, x, ranks=4).captured
    program = plan_on_axes(canonical(captured, 4), (2, 2), PRESETS["cpu"], pins, False)
    rewrite(program, training=True)
    placed = [str(d.params[n]) for d in program.decisions for n in d.params if "down_proj" in n.name]
    assert placed == ["S(0)", "S(2)"]
    for found in programs.run_ranks(program, model, x):
        torch.testing.assert_close(found[0], model(x), rtol=1e-11, atol=1e-11)
    programs.gradients_agree(program, model, x)

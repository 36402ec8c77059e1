"""Merged matmuls on a rank: one call on the packed weight itself, and where it is not done."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.helpers import programs, toys
from tpcompile.lowering import simulate
from tpcompile.lowering.state import SOURCE
from tpcompile.passes.merge_matmuls import MergeMatmuls
from tpcompile.passes.pipeline import run_passes
from tpcompile.pipeline import after_planning, rewrite
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.planner.search.cost import PRESETS, CostModel

aten = torch.ops.aten
MATMULS = (aten.linear.default, aten.addmm.default)
F64 = torch.float64

# The toy, its input, the packed parameter, and how many segments a placeholder of it stands for.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, list[int]]] = {
    "all segments": (lambda: toys.Attention(True), (3, 7, 20), "qkv.weight", [3]),
    "by columns": (toys.PackedColumns, (3, 7, 12), "weight", [2]),
    # The only key head is whole on all ranks: its gradient is not a summand, so its input is another one.
    "some segments": (lambda: toys.Attention(True, groups=1), (3, 7, 20), "qkv.weight", [1, 2]),
}


def _rewritten(
    make: Callable[[], nn.Module], shape: tuple[int, ...], ranks: int
) -> tuple[nn.Module, torch.Tensor, GlobalProgram]:
    torch.manual_seed(0)
    model, x = make().to(F64), torch.randn(shape, dtype=F64)
    program = programs.planned(model, x, ranks=ranks)
    rewrite(program, training=True)
    return model, x, program


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_packed_weight_is_used_as_it_lies(name: str, ranks: int) -> None:
    make, shape, weight, counts = CASES[name]
    model, x, program = _rewritten(make, shape, ranks)
    for local in simulate.lower_all(program):
        fed = [n.meta[SOURCE] for n in local.graph.find_nodes(op="placeholder")]
        mine = sorted((s.order, s.count) for s in fed if s.spec.name == weight)
        assert [count for _, count in mine] == counts
        assert not any(n.target is aten.cat.default for n in local.graph.nodes)
    with torch.no_grad():
        wanted = model(x)
    for results in programs.run_ranks(program, model, x):
        torch.testing.assert_close(results[0], wanted, rtol=1e-11, atol=1e-11)
    programs.gradients_agree(program, model, x)


def test_not_where_nothing_is_saved() -> None:
    """Without a price on calls and on reading the input, several matmuls are as good as one."""
    free = CostModel("free", 1e12, float("inf"), 1e-5, 1e9, launch=0.0)
    program = programs.planned(toys.Attention(True), torch.randn(3, 7, 20))
    run_passes(program, [p for p in after_planning(training=True) if p.name != MergeMatmuls.name])
    assert not MergeMatmuls(free).apply(program)
    assert MergeMatmuls(PRESETS["h100"]).apply(program)
    assert not MergeMatmuls(PRESETS["h100"]).apply(program)

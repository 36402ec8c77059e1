"""What a sharded model shows of itself: where its weights are; in a notebook its plan and its graphs."""

from __future__ import annotations

import torch
from torch import nn

import tpcompile
from tests.helpers.run_ranks import run_spmd
from tests.helpers.toys import Attention, Mlp
from tests.on_ranks.shown import shown
from tpcompile.runtime.print_model import model_text

X = torch.zeros(2, 5, 20)
EXPECTED = """\
Sequential(
  (0): Attention(
    (qkv): Linear(
      in_features=20, out_features=50, bias=True
      weight: [S(0) | S(0) | S(0)] [25, 20] of [50, 20]
      bias: [S(0) | S(0) | S(0)] [25] of [50]
    )
    (out): Linear(
      in_features=30, out_features=20, bias=False
      weight: S(1) [20, 15] of [20, 30]
    )
  )
  (1-2): 2 x Mlp(
    (up): Linear(
      in_features=20, out_features=33, bias=True
      weight: S(0) [16, 20] of [33, 20]
      bias: S(0) [16] of [33]
    )
    (down): Linear(
      in_features=33, out_features=20, bias=True
      weight: S(1) [20, 16] of [20, 33]
      bias: R [20]
    )
  )
)"""


def model() -> nn.Module:
    return nn.Sequential(Attention(packed=True), Mlp(20, 33), Mlp(20, 33)).eval()


def test_a_model_prints_what_a_rank_holds() -> None:
    layout = tpcompile.plan(model(), 2, (X,)).layout
    assert model_text(model(), layout, 1) == EXPECTED
    assert model_text(model(), layout, 0).count("[17, 20] of [33, 20]") == 1
    assert "weight" not in model_text(model(), None, 0)


def test_a_sharded_model_shows_itself() -> None:
    found = run_spmd(shown, 2)
    for rank, (before, text, table, graph, traced, ranges, _) in enumerate(found):
        assert before is None
        assert f"weight: S(0) [{17 - rank}, 20] of [33, 20]" in text
        assert "Sequential on 2 ranks" in table and "S(1)" in table
        assert graph.count("tpc-collective") == 1  # of the layer that is drawn
        assert "plan for 2 ranks" in traced["tpcompile_plan"]
        assert (
            "all_reduce" in traced["tpcompile_global_graph"]
            and "all_reduce" in traced["tpcompile_rank_graph"]
        )
        assert [name for name in ranges if "." in name] == ["0.up", "0.down", "1.up", "1.down"]
        assert [name for name in ranges if "." not in name] == ["0", "1"]
    whole, *_ = (flops[0] for *_, flops in found)
    joined = {f"Attention.{name}" for name in "qkv"}  # whose gradients are computed together, in Attention
    together = {name: sum(flops[1][name] for *_, flops in found) for name in whole.keys() - joined}
    assert "Sequential.0.up" in whole
    assert together == {name: whole[name] for name in together}

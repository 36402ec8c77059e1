"""Whole experts on each rank: rows belong to whoever holds their expert, and the outputs are summed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformers.integrations.moe  # noqa: F401 (registers transformers.grouped_mm_fallback)
from torch import Tensor, nn
from torch.nn import functional as F

import tpcompile
from tests.helpers import families, programs
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import strategies as spmd_strategies
from tests.whole.test_families_simulated import (
    CAPTURED,
    OTHER,
    assert_equal_to_whole,
    captured,
    collectives,
    inputs,
    sharded,
)
from tpcompile.ir.placements import Owned, Partial, R, parse_placement
from tpcompile.lowering import simulate
from tpcompile.pipeline import rewrite
from tpcompile.planner.pins import make_pins
from tpcompile.strategies.read_rules import read_rules

EXPERTS = 7
GROUPED_LOOP = "transformers.grouped_mm_fallback.default"


class Experts(nn.Module):
    """Experts as transformers computes them: each row's weights looked up, or sorted rows in one matmul."""

    def __init__(self, grouped: bool, experts: int = EXPERTS, inner: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.grouped, self.count = grouped, experts
        self.gate = nn.Linear(12, experts)
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, 12) / 3)
        self.gate_up_proj_bias = nn.Parameter(torch.randn(experts, 2 * inner))
        self.down_proj = nn.Parameter(torch.randn(experts, 12, inner) / 3)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        rows, ids, shares = x.repeat_interleave(2, 0), chosen.reshape(-1), weights.reshape(-1, 1)
        out = self.sorted(rows, ids, shares) if self.grouped else self.each(rows, ids) * shares
        result: Tensor = x + out.view(-1, 2, 12).sum(1)
        return result

    def each(self, rows: Tensor, ids: Tensor) -> Tensor:
        made = torch.bmm(self.gate_up_proj[ids], rows.unsqueeze(-1)).squeeze(-1) + self.gate_up_proj_bias[ids]
        gate, up = made.chunk(2, -1)
        # One that turns zeros into something else: only whose row it is tells what is right.
        return torch.bmm(self.down_proj[ids], (F.silu(gate) * (up + 1)).unsqueeze(-1)).squeeze(-1)

    def sorted(self, rows: Tensor, ids: Tensor, shares: Tensor) -> Tensor:
        mm = torch.ops.transformers.grouped_mm_fallback
        ids, order = torch.sort(ids)
        counts = torch.histc(ids.float(), bins=self.count, min=0, max=self.count - 1)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        made = mm(rows[order], self.gate_up_proj.transpose(-2, -1), ends) + self.gate_up_proj_bias[ids]
        gate, up = made.chunk(2, -1)
        out = mm(F.silu(gate) * (up + 1), self.down_proj.transpose(-2, -1), ends) * shares[order]
        back: Tensor = out[torch.argsort(order)]
        return back


ISOLATED = {"gate_up_proj": "grouped_gemm", "gate_up_proj_bias": "ep", "down_proj": "local"}


@pytest.mark.parametrize("grouped", [False, True], ids=["batched", "grouped"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_results_and_gradients(grouped: bool, ranks: int) -> None:
    """7 experts, which no number of ranks divides, in forward and backward."""
    model, x = Experts(grouped).double(), torch.randn(9, 12, dtype=torch.float64)
    pins = make_pins(read_rules(model, ISOLATED).wishes)
    program = programs.planned(model, x, ranks=ranks, pins=pins)
    rewrite(program, training=True)
    for results in programs.run_ranks(program, model, x):
        torch.testing.assert_close(results[0], model(x), rtol=1e-11, atol=1e-11)
    programs.gradients_agree(program, model, x)
    assert program.text().count(" = all_reduce(") == 1
    assert program.text().count(" = mask_rows(") == 1


def test_one_row_of_tokens_may_choose_no_expert_of_a_rank() -> None:
    """All tokens choose the same two experts: the other ranks have no row, and no number that is none."""
    model, x = Experts(True).double(), torch.randn(9, 12, dtype=torch.float64)
    nn.init.zeros_(model.gate.weight)
    pins = make_pins(read_rules(model, ISOLATED).wishes)
    program = programs.planned(model, x, ranks=4, pins=pins)
    rewrite(program, training=True)
    for results in programs.run_ranks(program, model, x):
        torch.testing.assert_close(results[0], model(x), rtol=1e-11, atol=1e-11)
    programs.gradients_agree(program, model, x)


class TwoGroupedMatmuls(nn.Module):
    """torch's own kernel for sorted rows, in bfloat16, which is all that it can be captured in."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, 16, inner).bfloat16() / 4)
        self.down = nn.Parameter(torch.randn(3, inner, 16).bfloat16() / 8)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return F.grouped_mm(F.silu(F.grouped_mm(x, self.up, offs=ends)), self.down, offs=ends)


@pytest.mark.parametrize(("inner", "kernels"), [(48, {"aten._grouped_mm.default"}), (24, {GROUPED_LOOP})])
def test_widths_that_torchs_kernel_does_not_take(inner: int, kernels: set[str]) -> None:
    """It wants rows of multiples of 16 bytes: of 24 columns, 48 bytes, a rank has 24 bytes."""
    model, given = TwoGroupedMatmuls(inner), (torch.randn(9, 16).bfloat16(), torch.tensor([2, 2, 9]).int())
    pins = make_pins(read_rules(model, {"up": tpcompile.Shard(2), "down": tpcompile.Shard(1)}).wishes)
    program = programs.planned(model, *given, ranks=2, pins=pins)
    rewrite(program, training=False)
    for local in simulate.lower_all(program):
        assert {str(n.target) for n in local.graph.nodes if "grouped_mm" in str(n.target)} == kernels
    for results in programs.run_ranks(program, model, *given):
        torch.testing.assert_close(results[0], model(*given), rtol=2e-2, atol=2e-2)


def test_the_planner_chooses() -> None:
    """Experts too narrow to be divided evenly: whole ones do less arithmetic where rows are sorted."""
    x = torch.randn(90, 12)
    for inner, divided in ((3, 0), (10, 1)):
        model = Experts(True, experts=4, inner=inner)
        plan = tpcompile.plan(model, 2, (x,), dynamic=False, cost_model="cpu")
        segment = plan.layout.params["gate_up_proj"].segments[0]
        dims = [d for d, dim in enumerate(segment.atoms) for _ in dim]
        assert segment.shards[0] is not None and dims[segment.shards[0]] == divided, str(plan)


def test_the_placement_is_text() -> None:
    owned = Owned(1, "getitem_3", 6)
    assert parse_placement(str(owned)) == owned
    assert [parse_placement(t) for t in ("R", "P(sum)")] == [R, Partial()]


@pytest.fixture
def grouped_mm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Families are captured with sorted rows."""
    captured.cache_clear()
    monkeypatch.setattr(families, "EXPERTS_IMPLEMENTATION", "grouped_mm")
    yield
    captured.cache_clear()


def experts_of(model: nn.Module) -> dict[str, str]:
    """All stacks of experts of a model."""
    stacks = [n for n, p in model.named_parameters() if ".experts." in n and p.ndim >= 2]
    assert stacks
    return dict.fromkeys(stacks, "ep")


def check_family(name: str, ranks: int, budget: int) -> float:
    model, _ = captured(name)
    model, program, layout = sharded(name, ranks, read_rules(model, experts_of(model)))
    for stack in experts_of(model):
        experts = layout.params[stack].shape[0]
        held = [layout.local_shape(stack, rank) for rank in range(ranks)]
        assert sum(h[0] for h in held) == experts
        assert all(h[1:] == layout.params[stack].shape[1:] for h in held)
    assert collectives(program) <= budget
    model.set_experts_implementation("batched_mm")  # type: ignore[operator]
    lowered = simulate.lower_all(program)
    share = assert_equal_to_whole(model, program, lowered, inputs(name, CAPTURED))
    assert_equal_to_whole(model, program, lowered, inputs(name, OTHER))
    return share


def test_sorted_rows_with_biases(grouped_mm: None) -> None:
    """gpt_oss: six experts on four ranks, each with two biases; one all-reduce per layer for them."""
    check_family("gpt_oss", 4, 6)


def test_a_dense_batch_of_experts() -> None:
    """llama4 multiplies every token with every expert: there the experts are an ordinary batch."""
    assert check_family("llama4_text", 2, 6) <= 0.55


def test_on_processes() -> None:
    for found in run_spmd(spmd_strategies.with_plan, 2, "mixtral", "hf-ep", timeout=300):
        assert found["error"] <= 1e-5 and found["gradients"] <= 1e-5

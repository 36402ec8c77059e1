"""Sequence parallelism: the right numbers and gradients for any length, and collectives as they should be."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tpcompile
from tests.helpers import families, programs, toys
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import sequence as spmd_sequence
from tests.whole.test_families_simulated import assert_equal_to_whole
from tpcompile.capture.export.capture_model import capture
from tpcompile.ir import markers
from tpcompile.ir.calls import bind_call
from tpcompile.ir.placements import Filled, parse_placement
from tpcompile.lowering import simulate
from tpcompile.pipeline import canonical, plan_program, rewrite
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.planner.search.cost import preset

F64 = torch.float64
TIMEOUT = 420


class Decoder(nn.Module):
    """What a region may meet: weights of positions, a scale, a parallel block, a state that is returned."""

    def __init__(self, width: int = 20) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(23, width), nn.Embedding(64, width)
        self.first, self.second, self.last = (nn.LayerNorm(width) for _ in range(3))
        self.attention, self.both = toys.Attention(False, width), toys.Parallel(width)
        self.up, self.down = nn.Linear(width, 28), nn.Linear(28, width)
        self.scale, self.head = nn.Parameter(torch.randn(width)), nn.Linear(width, 23, bias=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keep = (ids % 3 > 0).to(self.scale.dtype)
        h = self.embed(ids) + self.positions(torch.arange(ids.shape[1]))
        h = state = (h + self.attention(self.first(h))) * keep[..., None]
        h = h + self.down(F.silu(self.up(self.second(h)))) * self.scale
        h = self.both(h)
        return self.head(self.last(h)), state, h.mean(1)


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, 23, (batch, length), generator=torch.Generator().manual_seed(batch + 7 * length))


def divided_program(model: nn.Module, *args: Any, **options: Any) -> GlobalProgram:
    program = programs.planned(model, *args, **options)
    rewrite(program, training=True, sequence=True)
    return program


def kinds(program: GlobalProgram) -> Counter[str]:
    """How often each marker stands in a program."""
    names = [n.target.__name__ for n in program.graph.nodes if n.target in markers.MARKERS]
    return Counter(names)


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_length(ranks: int) -> None:
    """One program for lengths that the ranks divide, that they do not, and shorter than there are ranks.

    It is captured for one position per rank, which must not be taken for the only length.
    """
    torch.manual_seed(0)
    model = Decoder().double()
    program = divided_program(model, tokens(3, ranks), ranks=ranks, dynamic=True)
    found = kinds(program)
    assert found["reduce_scatter"] + found["all_to_all"] == 4 and found["all_reduce"] == 0
    lowered = simulate.lower_all(program)
    for sizes in ((3, 16), (2, 13), (2, 3), (5, 2)):
        expected = programs.run_whole(program, model, tokens(*sizes))
        for mine in programs.run_ranks(program, model, tokens(*sizes), lowered=lowered):
            torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11)
    programs.gradients_agree(program, model, tokens(2, 13))


def test_an_input_that_is_added_has_its_gradient() -> None:
    torch.manual_seed(0)
    model, x = toys.Blocks().double(), torch.randn(3, 8, 12, dtype=F64)
    program = divided_program(model, x, ranks=3, dynamic=True)
    assert kinds(program)["take_shard"] == 1
    programs.gradients_agree(program, model, x)


@pytest.mark.parametrize(("ranks", "length"), [(3, 13), (4, 3)])
def test_fixed_lengths(ranks: int, length: int) -> None:
    torch.manual_seed(0)
    model = Decoder().double()
    program = divided_program(model, tokens(2, length), ranks=ranks, dynamic=False)
    expected = programs.run_whole(program, model, tokens(2, length))
    for mine in programs.run_ranks(program, model, tokens(2, length)):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11)
    programs.gradients_agree(program, model, tokens(2, length))


@pytest.mark.parametrize("sizes", [(0, 6, 12), (3, 0, 12)])
def test_no_rows_are_not_divided(sizes: tuple[int, ...]) -> None:
    model, x = toys.Blocks().double(), torch.randn(sizes, dtype=F64)
    program = divided_program(model, x, ranks=2, dynamic=True)
    for mine in programs.run_ranks(program, model, x):
        torch.testing.assert_close(mine, programs.run_whole(program, model, x))


class Picked(nn.Module):
    """Rows are added to others, which are picked by numbers: all of them must be there to be picked from."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = toys.Blocks()

    def forward(self, x: Tensor, order: Tensor) -> Tensor:
        h, _ = self.blocks(x)
        y: Tensor = h + h[order]
        return y


def test_what_is_indexed_is_whole() -> None:
    torch.manual_seed(0)
    model, x = Picked().double(), torch.randn(9, 12, dtype=F64)
    program = divided_program(model, x, torch.arange(9).flip(0), ranks=2, dynamic=False)
    assert kinds(program)["reduce_scatter"] == 2
    programs.gradients_agree(program, model, x, torch.arange(9).flip(0))


class Chunks(nn.Module):
    """Much more is needed whole than is reduced."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = toys.Blocks()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h, _ = self.blocks(x)
        return tuple(h * i for i in range(12))


def test_what_would_send_more_is_left_whole() -> None:
    program = divided_program(Chunks(), torch.randn(3, 7, 12), dynamic=True)
    assert kinds(program)["reduce_scatter"] == 0
    assert "more than twice as many bytes" in program.captured.notes[0]


# Collectives of a forward of two layers: parallel residuals, routed tokens, biases, sub-axes.
FAMILIES = {
    ("cohere", 2): {"reduce_scatter": 3, "all_gather": 4},
    ("mixtral", 2): {"all_to_all": 1, "reduce_scatter": 4, "all_gather": 6, "gradient_once": 2},
    ("two_kv_heads", 4): {"all_to_all": 1, "reduce_scatter": 4, "all_gather": 6, "gradient_once": 2},
}


@pytest.mark.parametrize(("name", "ranks"), FAMILIES)
def test_families(name: str, ranks: int) -> None:
    model = families.build(name, F64) if name in families.FAMILIES else families.EDGE_CASES[name](dtype=F64)
    base = canonical(capture(model, bind_call(model, (), families.causal_inputs(2, 16))), ranks)
    program = plan_program(base, preset("cpu"), programs.no_pins)
    rewrite(program, training=True, sequence=True)
    found = kinds(program)
    assert {kind: found[kind] for kind in FAMILIES[name, ranks]} == FAMILIES[name, ranks]
    assert found["all_reduce"] == 0
    assert_equal_to_whole(model, program, simulate.lower_all(program), families.causal_inputs(3, 13))


class Towers(nn.Module):
    """Two parts that have nothing to do with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = toys.Blocks(), toys.Blocks()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.left(x)[0] @ self.right(x)[0].transpose(1, 2)
        return y


def plan_of(model: nn.Module, *args: Tensor, **options: Any) -> tpcompile.Plan:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = tpcompile.plan(model, 2, args, **options)
    told = [str(w.message) for w in caught if "sequence" in str(w.message)]
    assert bool(told) == any("the sequence is not divided" in note for note in plan.notes)
    return plan


def where(plan: tpcompile.Plan) -> set[str]:
    return {c.where.split(".")[0] for c in plan.collectives if c.kind == "reduce_scatter"}


def test_asked_for_at_modules(tmp_path: Path) -> None:
    x = torch.randn(3, 7, 12)
    assert where(plan_of(Towers(), x)) == set()
    assert where(plan_of(Towers(), x, sequence_parallel=True)) == {"left", "right"}
    plan = plan_of(Towers(), x, plan={"*.second": "replicate", "right.second": "sequence_parallel"})
    assert where(plan) == {"right"}
    plan.save(tmp_path / "plan.json")
    assert tpcompile.Plan.load(tmp_path / "plan.json").sequence == frozenset({"right.second"})


def test_what_cannot_be_divided_is_noted() -> None:
    plan = plan_of(Towers(), torch.randn(3, 7, 12), plan={"right.first": "sequence_parallel"})
    (note,) = [n for n in plan.notes if "sequence" in n]
    assert note == (
        "the sequence is not divided at right.first: no sum over the ranks leads to it by way of calls "
        "that treat positions one by one"
    )
    (note,) = plan_of(Towers(), torch.randn(3, 1, 12), sequence_parallel=True, dynamic=False).notes
    assert note == "the sequence is not divided anywhere: the call has one position"


def test_a_plan_tells_what_is_sent() -> None:
    x = torch.randn(3, 7, 12)
    plain, plan = plan_of(toys.Blocks(), x), plan_of(toys.Blocks(), x, sequence_parallel=True)
    count = Counter({(c.kind): 0 for c in plan.collectives})
    for c in plan.collectives:
        count[c.kind] += c.count
    # Two sums; gathered for the second MLP, and for both results.
    assert count == {"reduce_scatter": 2, "all_gather": 3}
    gather, reduce = (f(x.numel() * 4, 2) for f in (plan.cost.all_gather, plan.cost.all_reduce))
    assert plan.seconds - plain.seconds == pytest.approx(5 * gather - 2 * reduce)
    assert "reduce_scatter" in str(plan) and "all_reduce" not in str(plan)


def test_the_placement_is_printed() -> None:
    assert str(Filled(1)) == "S(1+)" and parse_placement("S(1+)") == Filled(1)
    assert parse_placement("O(0 of 6 by ids)").units == 6  # type: ignore[union-attr]
    program = divided_program(toys.Blocks(), torch.randn(3, 7, 12), dynamic=True)
    assert (
        "f32[s77, s27, 12] S(1+) = reduce_scatter(" in program.text()
        or "S(1+) = reduce_scatter(" in program.text()
    )


def check_training(found: dict[str, Any], tolerance: float) -> None:
    assert found["forward"] <= tolerance and found["gradients"] <= tolerance
    assert found["divided"] > 0 and not found["notes"]


def test_training_gpt2() -> None:
    for found in run_spmd(spmd_sequence.train, 4, "gpt2", F64, False, timeout=TIMEOUT):
        check_training(found, 1e-11)


@pytest.mark.parametrize(("ranks", "compiled"), [(2, True), (4, False)])
def test_training_llama(ranks: int, compiled: bool) -> None:
    for found in run_spmd(spmd_sequence.train, ranks, "llama", torch.float32, compiled, timeout=TIMEOUT):
        check_training(found, 1e-5)
        assert found["kinds"] == {"all_gather", "reduce_scatter", "all_to_all"}
        assert found["graphs"] == (2 if compiled else 0)


def test_dropout_is_that_of_one_rank() -> None:
    for found in run_spmd(spmd_sequence.dropout, 2, timeout=TIMEOUT):
        assert found["forward"] <= 1e-11 and found["gradients"] <= 1e-11
        assert found["parts"] == 3  # behind the embedding, the attention and the MLP


def test_generating() -> None:
    for found in run_spmd(spmd_sequence.tokens, 2, timeout=TIMEOUT):
        assert found["same"] and found["dynamic"] and found["static"] and found["steps"] == 0
        assert "one position" in found["note"][0]


def test_repeated_layers() -> None:
    for found in run_spmd(spmd_sequence.layers, 2, timeout=TIMEOUT):
        assert max(found["logits"], found["gradients"], found["states"]) <= 1e-5
        assert found["calls"] == 7 and not found["one by one"]
        assert found["plan"]["reduce_scatter", "model.layers.*.mlp.down_proj"] == 8


def test_ranks_that_differ_are_told() -> None:
    for message in run_spmd(spmd_sequence.ranks_differ, 2, timeout=TIMEOUT):
        assert "rank 0 has 'sequence: True', rank 1 has 'sequence: []'" in message


class Scanned(nn.Module):
    """Blocks, and behind them a loop over the positions: only then it shows that the length is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = toys.Blocks()

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)[0]
        steps = [x[:, 0]]
        for at in range(1, x.shape[1]):
            steps.append(steps[-1] / 2 + x[:, at])
        return torch.stack(steps, 1)


@pytest.mark.parametrize("length", [4, 5])
def test_a_length_that_the_model_fixes(length: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, length, 12, dtype=torch.float64)
    report = tpcompile.verify(Scanned().double(), 2, (x,), sequence_parallel=True)
    assert report.ok, report

"""Sub-axes are planned one by one, for their joint cost: the oracle is the joint problem."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import families, programs, toys
from tests.helpers.joint_plan import JointPlan
from tests.helpers.random_programs import random_program
from tpcompile.ir.markers import COMMUNICATING
from tpcompile.ir.placements import Shard
from tpcompile.pipeline import rewrite
from tpcompile.planner.decide import plan_on_axes
from tpcompile.planner.explain import explain_module
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.planner.search.axis_problem import AxisProblem, solve_axis
from tpcompile.planner.search.cost import PRESETS, CostModel
from tpcompile.planner.search.facts import Facts
from tpcompile.planner.search.solve_axes import solve_axes
from tpcompile.rules.assignment import Assignment

AXES = [(2, 2), (2, 3), (3, 2), (4, 2)]


def _search(program: GlobalProgram, preset: str) -> Facts:
    return Facts(program, program.factors(), PRESETS[preset])


def _solve(facts: Facts, axis_sizes: Sequence[int]) -> list[Assignment]:
    return solve_axes(facts, axis_sizes, lambda _: {})


def _worth(decisions: Sequence[Assignment]) -> float:
    return sum(d.penalty + d.price + d.cost for d in decisions)


class Largest(nn.Module):
    """A maximum over what a matmul gives: torch has none of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(20, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).amax(-1)


@pytest.mark.parametrize(("axis_sizes", "divided"), [((2, 2), True), ((4, 2), False)])
def test_no_rank_is_left_without_a_part(axis_sizes: tuple[int, int], divided: bool) -> None:
    """Of 6 rows 4 ranks have 2, 2, 1, 1: two ranks more could not all have a row."""
    model, x = Largest().double(), torch.randn(3, 7, 20, dtype=torch.float64)
    program = programs.canonicalised(model, x, ranks=math.prod(axis_sizes))
    rows = frozenset({Shard(0)})
    planned = plan_on_axes(program, axis_sizes, PRESETS["cpu"], lambda w, _: dict.fromkeys(w.params(), rows))
    rewrite(planned, training=False)
    assert ("P(max) x P(max) = aten.amax" in planned.text()) == divided
    for results in programs.run_ranks(planned, model, x):
        torch.testing.assert_close(results, [model(x)], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("preset", ["cpu", "h100"])
def test_as_good_as_all_axes_together(preset: str) -> None:
    for seed in range(40, 60):
        axis_sizes = AXES[seed % len(AXES)]
        program = random_program(seed, calls=4 + seed % 9, ranks=math.prod(axis_sizes))
        facts = _search(program, preset)
        best = JointPlan(facts, axis_sizes).worth()
        assert _worth(_solve(facts, axis_sizes)) == pytest.approx(best, rel=1e-9, abs=1e-12), seed


def test_an_earlier_axis_is_solved_again() -> None:
    """Where bytes are what counts, the first sub-axis would rather have known what the second does."""
    model, x, axis_sizes = toys.NormedHeads(heads=8, groups=2), torch.randn(3, 7, 20), (2, 4)
    program = programs.canonicalised(model, x, ranks=8)
    slow = CostModel("slow", flops=1e10, memory=1e7, latency=0.0, bandwidth=1e7)
    facts = Facts(program, program.factors(), slow)
    best = JointPlan(facts, axis_sizes).worth()
    once = solve_axis(facts, axis_sizes, 1, {0: solve_axis(facts, axis_sizes, 0, {})})
    assert _worth([once]) > 1.05 * best
    found = _solve(facts, axis_sizes)
    assert _worth(found) == pytest.approx(best, rel=1e-9)
    for axis in range(2):  # nothing is left to improve, and the parts add up to the whole
        again = solve_axis(facts, axis_sizes, axis, {1 - axis: found[1 - axis]})
        assert _worth([again]) == pytest.approx(best, rel=1e-9)


def test_fewer_collectives_come_before_memory() -> None:
    """A packed projection divided by its inputs would hold less, and repeat the attention on every rank."""
    model = families.EDGE_CASES["phi3_unequal_segments"]()
    program = programs.planned(model, ranks=8, **families.causal_inputs())
    assert program.axis_sizes == (4, 2)
    rewrite(program, training=False)
    assert sum(n.target in COMMUNICATING for n in program.graph.nodes) == 6


def test_prices_of_all_alternatives_at_once_are_those_of_each() -> None:
    """On sub-axes, with units that ranks share: what two passes say, and what planning anew does."""
    program = programs.planned(toys.Attention(packed=True), torch.zeros(2, 3, 20), ranks=4)
    assert len(program.axis_sizes) == 2 and program.planned_factors is not None
    facts = Facts(program, program.planned_factors, PRESETS["cpu"])
    for axis in range(2):
        others = {1 - axis: program.decisions[1 - axis]}
        problem = AxisProblem(facts, program.axis_sizes, axis, others, {}).build()
        best = problem.solve()
        for param, costs in problem.extras().items():
            for option, extra in costs.items():
                pins = {param: frozenset({option})}
                wanted = solve_axis(facts, program.axis_sizes, axis, others, pins)
                assert _worth([problem.solve(param, option)]) == pytest.approx(_worth([wanted]))
                assert _worth([wanted]) - _worth([best]) == pytest.approx(extra, abs=1e-9)


def test_no_alternative_would_have_been_cheaper() -> None:
    """The explanation of a plan on sub-axes compares with the rest of the plan as it is."""
    model = families.build("llama", num_key_value_heads=2, num_hidden_layers=1)
    program = programs.planned(model, ranks=4, **families.causal_inputs())
    text = explain_module(program, PRESETS["cpu"], programs.no_pins, "model.layers.0.self_attn")
    assert "chosen on sub-axis 0 of 2: S(0)" in text
    assert "chosen on sub-axis 1 of 2: R" in text  # keys and values, whose heads are spent
    assert "refused: nothing is left to divide" in text
    assert ": +" in text
    cheaper = [line for line in text.splitlines() if ": -" in line]
    assert all(line.endswith("but a large matrix must be divided") for line in cheaper)

"""The search: as good as trying everything, the same for any hash seed, and the plans that experts know."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import families, programs, toys
from tests.helpers.random_programs import INPUTS, MODEL, random_program
from tpcompile.capture.repeats.capture_repeated import capture_repeated, unroll_captured
from tpcompile.errors import CannotCapture
from tpcompile.ir.calls import bind_call
from tpcompile.ir.markers import COMMUNICATING, copy_to_ranks
from tpcompile.ir.placements import Shard
from tpcompile.pipeline import rewrite
from tpcompile.planner.collective import collectives_of
from tpcompile.planner.decide import _fits_together, plan_on_axes
from tpcompile.planner.decisions import decisions_to_data
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.planner.search import axis_problem
from tpcompile.planner.search.cost import PRESETS
from tpcompile.planner.search.eliminate import Problem, solve
from tpcompile.planner.search.facts import Facts

Solution = tuple[dict[Hashable, int], float]
MOST = 200_000


def _space(problem: Problem) -> int:
    return math.prod(problem.domains.values())


def _try_everything(problem: Problem) -> Solution:
    """All assignments at once: an index per variable, tables looked up, costs added."""
    names = list(problem.domains)
    shape = [problem.domains[n] for n in names]
    indices = dict(zip(names, np.unravel_index(np.arange(_space(problem)), shape), strict=True))
    total = sum(table[tuple(indices[n] for n in scope)] for scope, table in problem.tables)
    best = int(np.argmin(total))
    return {n: int(i[best]) for n, i in indices.items()}, float(total[best])  # type: ignore[index]


def _plan(program: GlobalProgram, preset: str = "cpu") -> GlobalProgram:
    return plan_on_axes(program, (program.ranks,), PRESETS[preset], programs.no_pins)


def _worth(program: GlobalProgram) -> float:
    return sum(d.cost + d.price + d.penalty for d in program.decisions)


@pytest.mark.parametrize("preset", ["cpu", "h100"])
def test_equals_trying_everything(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    for seed in range(150):
        program = random_program(seed, calls=3 + seed % 4, ranks=2 + seed % 3)
        found = _plan(program, preset)
        sizes: list[int] = []

        def oracle(problem: Problem, sizes: list[int] = sizes) -> Solution:
            sizes.append(_space(problem))
            return _try_everything(problem) if sizes[0] <= MOST else solve(problem)

        with monkeypatch.context() as patch:
            patch.setattr(axis_problem, "solve", oracle)
            best = _plan(program, preset)
        assert _worth(found) == pytest.approx(_worth(best), rel=1e-9, abs=1e-12)
        compared += sizes[0] <= MOST
    assert compared >= 60


@pytest.mark.parametrize("ranks", [2, 3])
def test_random_programs_run(ranks: int) -> None:
    """Planned, rewritten, lowered and run in lockstep: results and gradients are those of the whole."""
    for seed in range(16):
        program = random_program(1000 + seed, calls=5 + seed % 12, ranks=ranks)
        wanted = programs.run_whole(program, MODEL, *INPUTS)
        planned = _plan(program)
        rewrite(planned, training=True)
        for results in programs.run_ranks(planned, MODEL, *INPUTS):
            torch.testing.assert_close(results, wanted, rtol=1e-10, atol=1e-10)
        programs.gradients_agree(planned, MODEL, *INPUTS)


# ------------------------------------------------------------------------------------------ known good plans


def _llama(layers: int = 2, ranks: int = 2, **fields: Any) -> GlobalProgram:
    model = families.build("llama", num_hidden_layers=layers, **fields)
    program = programs.captured(model, ranks=ranks, **families.causal_inputs())
    return programs.planned_work(program, PRESETS["h100"])


def _placements(program: GlobalProgram) -> dict[str, str]:
    """Per parameter, its placement on each sub-axis."""
    return {
        name: " x ".join(str(d.params[node]) for d in program.decisions)
        for node, name in program.params().items()
    }


def _collectives(program: GlobalProgram) -> int:
    return sum(n.target in COMMUNICATING for n in program.graph.nodes)


LAYER = {
    "self_attn.q_proj": "S(0)",
    "self_attn.k_proj": "S(0)",
    "self_attn.v_proj": "S(0)",
    "self_attn.o_proj": "S(1)",
    "mlp.gate_proj": "S(0)",
    "mlp.up_proj": "S(0)",
    "mlp.down_proj": "S(1)",
    "input_layernorm": "R",
    "post_attention_layernorm": "R",
}


def test_layers_left_out_of_the_graph_count() -> None:
    """Of seven layers three are captured; time and collectives are those of all seven, as is the plan."""
    model = families.build("llama", num_hidden_layers=7)
    short = capture_repeated(model, bind_call(model, (), families.causal_inputs()), dynamic=False)
    assert short.blocks is not None
    works = [programs.planned_work(GlobalProgram(short, 2))]
    works.append(programs.planned_work(GlobalProgram(unroll_captured(short), 2)))
    placements = [_placements(w) for w in works]
    assert placements[1] == placements[1] | placements[0]
    for program in works:
        rewrite(program, training=False)
    seconds = [sum(d.cost for d in w.decisions) for w in works]
    assert seconds[0] == pytest.approx(seconds[1], rel=1e-9)
    assert collectives_of(works[0]) == collectives_of(works[1])


def test_megatron_comes_out_by_itself() -> None:
    program = _llama()
    expected = {f"model.layers.{i}.{k}.weight": v for i in range(2) for k, v in LAYER.items()}
    found = _placements(program)
    assert {k: found[k] for k in expected} == expected
    assert found["model.norm.weight"] == "R"
    assert found["lm_head.weight"] == "S(0)"
    assert found["model.embed_tokens.weight"] in ("S(0)", "S(1)")
    rewrite(program, training=True)
    assert sum(n.target is copy_to_ranks for n in program.graph.nodes) == 5  # what backward reduces
    assert _collectives(program) == 6


def test_fewer_key_heads_than_ranks() -> None:
    """Keys are divided over the first sub-axis and whole on the second, queries over both."""
    program = _llama(ranks=8, num_key_value_heads=2)
    assert program.axis_sizes == (2, 4)
    found = _placements(program)
    assert found["model.layers.1.self_attn.q_proj.weight"] == "S(0) x S(0/1)"
    assert found["model.layers.1.self_attn.k_proj.weight"] == "S(0) x R"
    assert found["model.layers.1.self_attn.o_proj.weight"] == "S(1) x S(1/1)"


def test_identical_layers_are_planned_identically() -> None:
    found = _placements(_llama(layers=12))
    for key in LAYER:
        assert len({found[f"model.layers.{i}.{key}.weight"] for i in range(12)}) == 1, key


def test_parallel_branches_share_one_all_reduce() -> None:
    program = programs.planned(toys.Parallel(), torch.randn(3, 7, 20))
    rewrite(program, training=False)
    assert _collectives(program) == 1


def test_everything_is_paid_for() -> None:
    """The parts of a plan's worth add up to what the solver minimised."""
    solved: list[float] = []

    def spy(problem: Problem) -> Solution:
        values, cost = solve(problem)
        solved.append(cost)
        assert problem.cost(values) == pytest.approx(cost, rel=1e-12)
        return values, cost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(axis_problem, "solve", spy)
        program = _plan(random_program(3, 6, 2))
    (decision,) = program.decisions
    assert decision.penalty == 0
    assert decision.cost + decision.price == pytest.approx(solved[0], rel=1e-12)


def test_arithmetic_is_that_of_matmuls() -> None:
    """Attention counts as two matmuls, a look-up as none over the vocabulary."""
    model = families.build("llama", num_hidden_layers=1)
    program = programs.canonicalised(model, **families.causal_inputs())
    planner = Facts(program, program.factors(), PRESETS["cpu"])
    counts = {str(n.target).split(".")[1]: planner.quantities.operations(n) for n in planner.live}
    tokens, heads, size = families.BATCH * families.SEQ, 8, 12
    assert counts["scaled_dot_product_attention"] == 4 * tokens * families.SEQ * heads * size
    assert counts["linear"] == 2 * tokens * 40 * families.VOCAB  # the last one, the head
    assert counts["embedding"] <= 2 * tokens * 40
    assert counts["mul"] == 0


# ------------------------------------------------------------------------------------------------ an oracle


def _integer_program(problem: Problem) -> float:
    """The least cost by HiGHS: a choice per variable, a flow between the choices of each pair."""
    optimize = pytest.importorskip("scipy.optimize")
    sparse = pytest.importorskip("scipy.sparse")
    first, count = {}, 0
    for name, size in problem.domains.items():
        first[name], count = count, count + size
    choices = count
    costs = [0.0] * choices
    rows: list[dict[int, float]] = [
        {first[n] + i: 1.0 for i in range(size)} for n, size in problem.domains.items()
    ]
    right = [1.0] * len(rows)
    for scope, table in problem.tables:
        # Microseconds; what would leave a large matrix whole is not an option here.
        micro = np.where(table > 1, np.inf, table * 1e6)
        if len(scope) == 1:
            for i, cost in enumerate(micro):
                costs[first[scope[0]] + i] += cost
            continue
        a, b = scope
        cell = {(i, j): len(costs) + i * micro.shape[1] + j for i, j in np.ndindex(micro.shape)}
        costs += micro.flatten().tolist()
        for i in range(micro.shape[0]):
            rows.append({cell[i, j]: 1.0 for j in range(micro.shape[1])} | {first[a] + i: -1.0})
        for j in range(micro.shape[1]):
            rows.append({cell[i, j]: 1.0 for i in range(micro.shape[0])} | {first[b] + j: -1.0})
        right += [0.0] * sum(micro.shape)
    finite = np.isfinite(costs)
    matrix = sparse.dok_array((len(rows), len(costs)))
    for r, row in enumerate(rows):
        for c, value in row.items():
            matrix[r, c] = value
    answer = optimize.milp(
        np.where(finite, costs, 0.0),
        constraints=optimize.LinearConstraint(matrix.tocsr(), right, right),
        bounds=optimize.Bounds(0.0, finite.astype(float)),
        integrality=np.arange(len(costs)) < choices,
        options={"mip_rel_gap": 0.0, "time_limit": 60},
    )
    assert answer.success, answer.message
    return float(answer.fun) / 1e6


def test_equals_an_integer_program() -> None:
    model = families.build("llama")
    program = programs.canonicalised(model, **families.causal_inputs())
    problems: list[tuple[Problem, float]] = []

    def spy(problem: Problem) -> Solution:
        values, cost = solve(problem)
        problems.append((problem, cost))
        return values, cost

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(axis_problem, "solve", spy)
        _plan(program)
    ((problem, cost),) = problems
    assert len(problem.domains) > 100
    assert _integer_program(problem) == pytest.approx(cost, rel=1e-6)


# ------------------------------------------------------------------------------------------------ no chance

_PRINT = "from tests.planner.test_search import _decisions; print(_decisions())"


def _decisions() -> str:
    return "decisions " + json.dumps(decisions_to_data(_llama(layers=1, ranks=8)), sort_keys=True)


def test_the_hash_seed_decides_nothing() -> None:
    """Another process, whose sets of strings have another order, plans the same."""
    root = Path(__file__).resolve().parents[2]
    other = subprocess.run(
        [sys.executable, "-c", _PRINT],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "PYTHONHASHSEED": str(hash("a") % 1000 + 1)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    (found,) = [line for line in other.stdout.splitlines() if line.startswith("decisions ")]
    assert found == _decisions()


def test_packed_segments_must_fit_one_tensor() -> None:
    """Segments that are divided along different dimensions could not be held in one local tensor."""
    model = toys.Attention(True)
    program = programs.planned(model, torch.randn(3, 7, 20))
    assert program.packed_dims == {"qkv.weight": 0, "qkv.bias": 0}
    assert _fits_together(program)
    (decision,) = program.decisions
    (first, *_) = [n for n, name in program.params().items() if name == "qkv.weight"]
    turned = replace(decision, params={**decision.params, first: Shard(1)})
    assert not _fits_together(replace(program, decisions=[turned]))


def test_a_shape_that_data_decides_is_refused() -> None:
    """By name of the operator, and as something that may run as python (``compose``)."""
    with pytest.raises(CannotCapture, match=r"index_select.*is decided by the data"):
        programs.planned(toys.Choosing(), torch.randn(6, 12))

"""CoalesceCollectives on random programs: results and order stay right, and long programs take no longer.

The programs' values stand for those of ranks on two sub-axes, of 2 and of 4.
"""

from __future__ import annotations

import cProfile
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx import Node

from tests.helpers import programs
from tpcompile.ir.graph_edit import call
from tpcompile.ir.markers import all_reduce, all_reduce_coalesced, keep_first
from tpcompile.ir.placements import R, Shard
from tpcompile.passes.coalesce_collectives import CoalesceCollectives
from tpcompile.passes.pipeline import run_passes
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.planner.search.cost import PRESETS, CostModel
from tpcompile.rules.assignment import Assignment

aten = torch.ops.aten
PROGRAM = programs.captured(nn.Tanh(), torch.randn(4))
X = torch.arange(4.0) / 7

# Per call: an all-reduce of some kind or an addition, and which earlier values it takes.
Recipe = Sequence[tuple[str, int, int]]
# Kinds of all-reduces; the result of the parted one is divided on the second sub-axis.
AXES = {"reduce": (0,), "other": (1,), "both": (0, 1), "max": (0,), "parted": (0,)}


def _program(recipe: Recipe, results: int | None = None) -> GlobalProgram:
    """Calls in the order of the recipe; every value is returned, or only the last ones."""
    program = PROGRAM.copy()
    program.decisions = [Assignment(2), Assignment(4)]
    graph, start = program.graph, next(iter(program.sources))
    start.meta["placement"] = (R, R)
    (old,) = (n for n in graph.nodes if n.op == "call_function")
    out, mode = graph.output_node(), start.meta["val"].fake_mode
    values = [start]
    for kind, a, b in recipe:
        left, right = values[a % len(values)], values[b % len(values)]
        with graph.inserting_before(out):
            if kind == "add":
                node = call(graph, aten.add.Tensor, (left, right), like=start, mode=mode)
            else:
                axes, op = AXES[kind], "max" if kind == "max" else "sum"
                node = call(graph, all_reduce, (left, axes, op), like=start, mode=mode)
        node.meta["placement"] = (R, Shard(0) if kind == "parted" else R)
        values.append(node)
    out.args = (tuple(values[1:][-(results or 0) :]),)
    graph.erase_node(old)
    return program


def _run(program: GlobalProgram) -> list[torch.Tensor]:
    """Runs the graph; an all-reduce multiplies, so that one too many or too few is seen.

    Keeping a value on the first rank divides by what the all-reduce that follows will multiply with.
    """

    def factor(axes: tuple[int, ...], op: str) -> float:
        return math.prod((2.0, 8.0)[a] for a in axes) if op == "sum" else 0.5

    class Ranks(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):  # type: ignore[no-untyped-def]
            if target is all_reduce:
                return args[0] * factor(*args[1:])
            if target is all_reduce_coalesced:
                return [x * factor(*args[1:]) for x in args[0]]
            if target is keep_first:
                return args[0] / factor(args[1], "sum")
            return super().call_function(target, args, kwargs)

    return list(Ranks(program.captured.graph_module, graph=program.graph).run(X))


def _collectives(program: GlobalProgram) -> list[Node]:
    return [n for n in program.graph.nodes if n.target in (all_reduce, all_reduce_coalesced)]


CALL = st.tuples(
    st.sampled_from(["add", "add", "add", "reduce", *AXES]), st.integers(0, 99), st.integers(0, 99)
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(CALL, min_size=2, max_size=14))
def test_results_and_order_stay_right(recipe: Recipe) -> None:
    program = _program(recipe)
    before, wanted = _collectives(program), _run(program)
    # The runner's verifier refuses a node that stands before its operands.
    run_passes(program, [CoalesceCollectives()])
    torch.testing.assert_close(_run(program), wanted, rtol=0, atol=0)
    after = _collectives(program)
    carried = sum(1 if n.target is all_reduce else len(n.args[0]) for n in after)  # type: ignore[arg-type]
    assert carried == len(before)
    assert all(len(n.args[0]) > 1 for n in after if n.target is all_reduce_coalesced)  # type: ignore[arg-type]


def _text(recipe: Recipe, cost: CostModel = PRESETS["cpu"]) -> list[str]:
    program = _program(recipe)
    run_passes(program, [CoalesceCollectives(cost)])
    return [f"{n.target.__name__}{n.args[1]}" for n in _collectives(program)]  # type: ignore[union-attr]


def test_what_is_joined() -> None:
    one, two = "all_reduce(0,)", "all_reduce_coalesced(0,)"
    assert _text([("reduce", 0, 0), ("add", 0, 0), ("reduce", 2, 0)]) == [two]
    assert _text([("reduce", 0, 0), ("reduce", 1, 0)]) == [one, one]  # the second needs the first
    assert _text([("reduce", 0, 0), ("add", 1, 0), ("reduce", 2, 0)]) == [one, one]  # by way of a sum
    assert _text([("reduce", 0, 0), ("max", 0, 0)]) == [one, one]
    assert _text([("reduce", 0, 0)] * 3) == [two]
    assert _text([("reduce", 0, 0), ("parted", 0, 0)]) == [two]


def test_sums_on_other_sub_axes_join() -> None:
    all_axes = "all_reduce_coalesced(0, 1)"
    assert _text([("reduce", 0, 0), ("both", 0, 0)]) == [all_axes]
    assert _text([("both", 0, 0), ("other", 0, 0)]) == [all_axes]
    assert _text([("reduce", 0, 0), ("other", 0, 0), ("reduce", 0, 0)]) == [all_axes]
    assert _text([("reduce", 0, 0), ("both", 1, 0)]) == ["all_reduce(0,)", "all_reduce(0, 1)"]
    # What is divided on the second sub-axis is not a sum there, and never becomes one for free.
    assert _text([("parted", 0, 0), ("both", 0, 0)]) == ["all_reduce(0,)", "all_reduce(0, 1)"]
    # Nor a maximum, of which zeros would not be the neutral element.
    assert _text([("max", 0, 0), ("both", 0, 0)]) == ["all_reduce(0,)", "all_reduce(0, 1)"]


def test_other_sub_axes_join_where_it_pays() -> None:
    """Two reductions of 16 bytes in one save a latency, and send 56 bytes for 44."""
    recipe: Recipe = [("reduce", 0, 0), ("both", 0, 0)]
    free = CostModel("", flops=1.0, memory=1e30, latency=0.5, bandwidth=1.0, launch=0.0)
    assert _text(recipe, replace(free, latency=12.5)) == ["all_reduce_coalesced(0, 1)"]
    assert _text(recipe, replace(free, latency=11.5)) == ["all_reduce(0,)", "all_reduce(0, 1)"]
    assert len(_text(recipe, replace(free, latency=12.5, launch=1.0))) == 2  # the zeros take a call


def test_large_values_travel_alone() -> None:
    program = _program([("reduce", 0, 0), ("reduce", 0, 0)])
    run_passes(program, [CoalesceCollectives(largest=15)])  # a value has 16 bytes
    assert [n.target for n in _collectives(program)] == [all_reduce, all_reduce]


def test_thousands_of_calls() -> None:
    """Four times the calls take about four times the work, counted in function calls."""
    layer: Recipe = [("add", -1, 0), ("reduce", -1, 0), ("reduce", -2, 0), ("add", -1, -2), ("add", -1, 1)]
    counts = []
    for layers in (250, 1000):
        program = _program(list(layer) * layers, results=1)
        with cProfile.Profile() as profile:
            assert CoalesceCollectives().apply(program)
        counts.append(sum(entry.callcount for entry in profile.getstats()))
        assert len(_collectives(program)) == layers
    assert counts[1] < 5 * counts[0], counts

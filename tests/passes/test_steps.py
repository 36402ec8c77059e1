"""The moves between placements: on the data of simulated ranks they bring any placement to any other."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers import programs
from tpcompile.errors import TpCompileError
from tpcompile.ir import markers
from tpcompile.ir.conversions import steps
from tpcompile.ir.graph_edit import call
from tpcompile.ir.markers import Placements
from tpcompile.ir.placements import P, Partial, Placement, R, Shard, split_evenly
from tpcompile.lowering import simulate
from tpcompile.passes.choose_collectives import ChooseCollectives
from tpcompile.passes.pipeline import run_passes
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.rules.assignment import Assignment

ATOMS = (5, 3, 4)  # a value of shape [5, 12], its second dimension (3 4)
PLACES = {Shard(0): 0, Shard(1, 0): 1, Shard(1, 1): 2}
MAX = Partial("max")


class Viewed(nn.Module):
    """The view tells the compiler that the second dimension is a product."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 1, x.view(5, 3, 4)


PROGRAM = programs.captured(Viewed(), torch.randn(5, 12))


def _resharding(axis_sizes: tuple[int, ...], src: Placements, dst: Placements) -> GlobalProgram:
    """A program that only changes the placement of its input."""
    program = PROGRAM.copy()
    factors = program.factors()
    graph, value = program.graph, next(iter(program.sources))
    out = graph.output_node()
    with graph.inserting_before(out):
        node = call(graph, markers.reshard, (value, src, dst), like=value)
    value.meta["placement"], node.meta["placement"] = src, dst
    out.args = ((node, node),)
    for unused in reversed(list(graph.nodes)):
        if unused.op == "call_function" and not unused.users:
            graph.erase_node(unused)
    decisions = [Assignment(ranks) for ranks in axis_sizes]
    return replace(program, decisions=decisions, decided=factors)


def _cut(full: Tensor, axis_sizes: tuple[int, ...], at: tuple[int, ...], placements: Placements) -> Tensor:
    """What a rank holds of a value, sums left out: axes divide one after the other."""
    part = full.view(ATOMS)
    for ranks, i, placement in zip(axis_sizes, at, placements, strict=True):
        if isinstance(placement, Shard):
            dim = PLACES[placement]
            part = part.split(split_evenly(part.shape[dim], ranks), dim)[i]
    return part.flatten(1)


def _summands(
    full: Tensor, axis_sizes: tuple[int, ...], placements: Placements
) -> dict[tuple[int, ...], Tensor]:
    """Per coordinates on the axes with partial values, a value of which the reduction is the whole."""
    partial = [a for a, p in enumerate(placements) if isinstance(p, Partial)]
    summed = [a for a in partial if placements[a] == P]
    found = {}
    for at in itertools.product(*(range(axis_sizes[a]) for a in partial)):
        where = dict(zip(partial, at, strict=True))
        noise = torch.randint(1, 9, full.shape, generator=torch.Generator().manual_seed(hash(at) % 1000))
        largest = all(where[a] == axis_sizes[a] - 1 for a in partial if a not in summed)
        found[at] = (full if largest else full - noise) if all(where[a] == 0 for a in summed) else 0 * full
        if summed and any(where[a] for a in summed):
            found[at] = noise.to(full.dtype)
    for at in found:  # the first summand makes up for the others
        where = dict(zip(partial, at, strict=True))
        if summed and all(where[a] == 0 for a in summed):
            others = [
                v
                for other, v in found.items()
                if other != at and all(other[i] == at[i] for i, a in enumerate(partial) if a not in summed)
            ]
            found[at] = found[at] - sum(others)  # type: ignore[operator]
    return found


def _distribute(full: Tensor, axis_sizes: tuple[int, ...], placements: Placements) -> list[Tensor]:
    summands = _summands(full, axis_sizes, placements)
    found = []
    for at in simulate.coordinates(axis_sizes):
        key = tuple(c for c, p in zip(at, placements, strict=True) if isinstance(p, Partial))
        found.append(_cut(summands[key], axis_sizes, at, placements).clone())
    return found


def _check(axis_sizes: tuple[int, ...], src: Placements, dst: Placements) -> GlobalProgram:
    full = torch.randint(-9, 10, (5, 12), generator=torch.Generator().manual_seed(1)).float()
    program = _resharding(axis_sizes, src, dst)
    run_passes(program, [ChooseCollectives()])
    everyone = simulate.coordinates(axis_sizes)
    results = [r[0] for r in simulate.run(program, [[x] for x in _distribute(full, axis_sizes, src)])]
    for at in everyone:
        # Ranks that differ only where the result is a sum hold its summands.
        group = [
            results[i]
            for i, other in enumerate(everyone)
            if all(a == b or dst[k] == P for k, (a, b) in enumerate(zip(at, other, strict=True)))
        ]
        torch.testing.assert_close(torch.stack(group).sum(0), _cut(full, axis_sizes, at, dst), rtol=0, atol=0)
    return program


PLACEMENT: st.SearchStrategy[Placement] = st.sampled_from([R, P, *PLACES])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_steps_bring_any_placement_to_any_other(data: st.DataObject) -> None:
    axis_sizes = data.draw(st.sampled_from([(2,), (3,), (2, 2), (2, 3), (3, 2), (2, 2, 2)]))
    placements = st.tuples(*[PLACEMENT] * len(axis_sizes))
    _check(axis_sizes, data.draw(placements), data.draw(placements))


@pytest.mark.parametrize("axis_sizes", [(2,), (2, 2)])
def test_all_pairs_of_few_placements(axis_sizes: tuple[int, ...]) -> None:
    tuples = list(itertools.product([R, P, Shard(0)], repeat=len(axis_sizes)))
    for src, dst in itertools.product(tuples, tuples):
        _check(axis_sizes, src, dst)


@pytest.mark.parametrize("dst", [(R, R), (R, Shard(0)), (Shard(0), R)])
@pytest.mark.parametrize("src", [(MAX, R), (R, MAX), (MAX, Shard(0)), (MAX, MAX)])
def test_a_maximum_is_reduced_before_it_is_divided(src: Placements, dst: Placements) -> None:
    if any(x == MAX and isinstance(y, Shard) for x, y in zip(src, dst, strict=True)):
        with pytest.raises(TpCompileError, match=r"no collective brings P\(max\) to S\(0\)"):
            list(steps(src, dst))
    else:
        _check((2, 3), src, dst)


def test_a_maximum_may_stay_one() -> None:
    assert _names((MAX,), (MAX,)) == [] and _names((MAX, P), (MAX, R)) == ["all_reduce(1,)"]


def _names(src: Placements, dst: Placements) -> list[str]:
    return [f"{target.__name__}{options[0]}" for target, options, _ in steps(src, dst)]


S0, S1 = Shard(0), Shard(1)


@pytest.mark.parametrize(
    ("src", "dst", "expected"),
    [
        ((P,), (R,), ["all_reduce(0,)"]),
        ((P,), (S0,), ["reduce_scatter(0,)"]),
        ((S0,), (R,), ["all_gather(0,)"]),
        ((S0,), (S1,), ["all_to_all(0,)"]),
        ((R,), (S0,), ["take_shard(0,)"]),
        ((R,), (P,), ["keep_first(0,)"]),
        ((S0,), (P,), ["pad_shard(0,)"]),
        # Sub-axes that do the same go in one collective.
        ((P, P), (R, R), ["all_reduce(0, 1)"]),
        ((S0, S0), (R, R), ["all_gather(0, 1)"]),
        ((P, P), (S0, S0), ["reduce_scatter(0, 1)"]),
        ((S0, S0), (S1, S1), ["all_to_all(0, 1)"]),
        ((R, R), (P, P), ["keep_first(0, 1)"]),
        # What shrinks the value comes before what moves it, what grows it last.
        ((P, R), (R, S0), ["take_shard(1,)", "all_reduce(0,)"]),
        ((P, S0), (R, R), ["all_reduce(0,)", "all_gather(1,)"]),
        ((R, P), (S0, S0), ["take_shard(0,)", "reduce_scatter(1,)"]),
        # An outer axis cannot leave or enter before those inside it.
        ((S0, S0), (R, S0), ["all_gather(0, 1)", "take_shard(1,)"]),
        ((R, S0), (S0, S0), ["all_gather(1,)", "take_shard(0, 1)"]),
        ((S0, S0), (S0, R), ["all_gather(1,)"]),
        ((P, S0), (S0, S0), ["all_gather(1,)", "reduce_scatter(0,)", "take_shard(1,)"]),
        ((S0, S0), (P, S0), ["all_gather(1,)", "pad_shard(0,)", "take_shard(1,)"]),
        ((S0,), (S0,), []),
    ],
)
def test_the_moves_that_are_chosen(src: Placements, dst: Placements, expected: list[str]) -> None:
    assert _names(src, dst) == expected


@pytest.mark.parametrize(("src", "dst"), [((P,), (MAX,)), ((R,), (MAX,)), ((MAX,), (P,)), ((MAX,), (S0,))])
def test_what_no_collective_does_is_refused(src: Placements, dst: Placements) -> None:
    with pytest.raises(TpCompileError, match="no collective brings"):
        list(steps(src, dst))


def test_every_step_says_where_it_leads() -> None:
    for src, dst in itertools.product(itertools.product([R, P, S0, S1], repeat=2), repeat=2):
        after = src
        for _, _, after in steps(src, dst):  # noqa: B007
            pass
        assert after == dst


class Stacked(nn.Module):
    """Groups and heads stand before a batch of any size in one dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], 3, 4, 6).permute(1, 2, 0, 3).reshape(12 * x.shape[0], 6)


STACKED = programs.captured(Stacked(), torch.randn(5, 12, 6), dynamic=True)


@pytest.mark.parametrize("ranks", [2, 3])
def test_factors_beside_a_size_that_is_not_known(ranks: int) -> None:
    x = torch.randn(7, 12, 6)
    for src, dst in itertools.product([Shard(0), Shard(0, 1), Shard(1), R, P], repeat=2):
        program = STACKED.copy()
        graph, out = program.graph, program.graph.output_node()
        (value,) = program.outputs()
        for node in graph.nodes:
            node.meta["placement"] = (R,)
        path = (R, src, dst, R)
        for before, after in itertools.pairwise(path):
            with graph.inserting_before(out):
                value = call(graph, markers.reshard, (value, (before,), (after,)), like=value)
            value.meta["placement"] = (after,)
        out.args = ((value,),)
        program = replace(program, decisions=[Assignment(ranks)], decided=program.factors())
        ChooseCollectives().apply(program)
        for (result,) in simulate.run(program, [[x]] * ranks):
            assert torch.allclose(result, Stacked()(x)), (src, dst)

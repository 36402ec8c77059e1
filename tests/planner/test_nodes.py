"""Links within nodes and between them: which of them a collective takes, and what plans and estimates say."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

import tpcompile
from tests.helpers.toys import Mlp
from tpcompile import CostModel, Plan, TpCompileError
from tpcompile.planner.search.cost import PRESETS, preset

X = torch.ones(3, 5, 12)
NODES = preset("h100x8")


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 20), st.data())
def test_which_groups_are_on_several_nodes(sizes: list[int], node: int, data: st.DataObject) -> None:
    axes = data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1))
    groups: dict[Any, list[int]] = {}
    for rank, place in enumerate(itertools.product(*map(range, sizes))):
        groups.setdefault(tuple(at for a, at in enumerate(place) if a not in axes), []).append(rank // node)
    fewest = [min(map(on.count, on)) for on in groups.values() if len(set(on)) > 1]
    found = replace(NODES, node=node).near(sorted(axes), sizes)
    assert found == (min(fewest) if fewest else None)
    assert PRESETS["h100"].near(sorted(axes), sizes) is None
    first = min((a for a in axes if sizes[a] > 1), default=None)
    block = 1 if first is None else math.prod(sizes[first:])
    assert (found is not None) == (math.prod(sizes) > node and node % block != 0)


def test_seconds_between_nodes() -> None:
    """A ring over 2 x 8 ranks has eight adapters in each node, one over a rank of each node has one."""
    size, far = 1 << 30, 40e9
    assert [NODES.near(axes, (2, 8)) for axes in ([0], [1], [0, 1])] == [1, None, 8]
    assert NODES.near([0], (4, 4)) == 2 and NODES.near([0], (8,)) is None
    assert NODES.all_reduce(size, 2, 1) == pytest.approx(32e-6 + size / far)
    assert NODES.all_reduce(size, 16, 8) == pytest.approx(32e-6 + 2 * 15 / 16 * size / (8 * far))
    assert NODES.all_gather(size, 16, 8) == pytest.approx(32e-6 + 15 / 16 * size / (8 * far))
    assert NODES.all_to_all(size, 16, 8) == pytest.approx(32e-6 + 8 / 16**2 * size / far)
    quick = replace(NODES, far_bandwidth=1e12)
    assert quick.all_reduce(size, 16, 8) == pytest.approx(32e-6 + 2 * 15 / 16 * size / NODES.bandwidth)
    assert quick.all_to_all(size, 16, 8) == pytest.approx(32e-6 + 7 / 16**2 * size / NODES.bandwidth)
    alike = CostModel("alike", 1e12, 1e12, 1e-5, 1e11, node=8)
    assert alike.all_reduce(size, 16, 8) == alike.all_reduce(size, 16)


@pytest.mark.parametrize("ranks", [4, 8, 16])
def test_a_plan_says_what_its_sum_takes(ranks: int) -> None:
    model = Mlp()
    near, far = (tpcompile.plan(model, ranks, (X,), cost_model=cost) for cost in ("h100", "h100x8"))
    (sum_,) = far.collectives
    assert sum_.kind == "all_reduce" and near.collectives == far.collectives
    crossing = 8 if ranks > 8 else None
    more = NODES.all_reduce(sum_.bytes, ranks, crossing) - NODES.all_reduce(sum_.bytes, ranks)
    assert (more > 0) == (ranks == 16)
    assert far.seconds - near.seconds == pytest.approx(more, abs=1e-12)


def llama(**fields: Any) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, **heads, **fields)
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def test_sub_axes_within_and_between_nodes(tmp_path: Path) -> None:
    """Two heads of keys: 16 ranks are 2 x 8, and a node is a sub-axis, or half of one."""
    model = llama()
    plans = {name: tpcompile.plan(model, 16, cost_model=name) for name in ("h100", "h100x8", "h100x4")}
    assert {plan.axis_sizes for plan in plans.values()} == {(2, 8)}
    assert plans["h100"].seconds < plans["h100x8"].seconds < plans["h100x4"].seconds
    plans["h100x8"].save(tmp_path / "plan")
    assert asdict(Plan.load(tmp_path / "plan").cost) == asdict(NODES)
    near, far = (plans[name].estimate("train", batch=2, seq=16) for name in ("h100", "h100x8"))
    assert near.collectives == far.collectives and near.memory == far.memory
    assert near.time.communication < far.time.communication and near.time.compute == far.time.compute
    assert any("40 GB/s of each rank between nodes of 8" in line for line in far.rests_on)
    divided = [tpcompile.plan(model, 16, cost_model=name, sequence_parallel=True) for name in plans]
    assert divided[0].seconds < divided[1].seconds < divided[2].seconds


def test_fit_over_nodes() -> None:
    model = llama()
    near, far = (tpcompile.fit(model, ranks=[8, 16], device=d, seq=16).sizes for d in ("h100", "h100x8"))
    seconds = [[size.estimate.time.communication for size in sizes if size.estimate] for sizes in (near, far)]
    assert seconds[0][0] == seconds[1][0] and seconds[0][1] < seconds[1][1]


@pytest.mark.parametrize("name", ["cpux8", "h100x", "h100x0", "h100x-8", "h100x8x8", "x8"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(TpCompileError, match=r"no cost model named.*(?s:.*)for nodes of 8 ranks h100x8"):
        preset(name)
    with pytest.raises(TpCompileError, match="node is 0"):
        replace(NODES, node=0)
    with pytest.raises(TpCompileError, match="no device named"):
        tpcompile.fit(llama(), ranks=[2], device=name, seq=16)

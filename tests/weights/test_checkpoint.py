"""Checkpoints of sharded models: boxes of parameters, and DCP between any numbers of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

import tpcompile
from tests.helpers.one_rank import weights_of
from tests.helpers.run_ranks import run_spmd
from tests.ir.test_layout import layouts
from tests.on_ranks import checkpoint as spmd_checkpoint
from tests.on_ranks.models import CAPTURED, build, call
from tpcompile.ir.layout.segment import Segment
from tpcompile.ir.layout.weight_layout import ParamLayout, WeightLayout, whole_layout
from tpcompile.weights.checkpoint_boxes import held_box
from tpcompile.weights.sharded_parameter import ShardedParameter

TIMEOUT = 300

# ------------------------------------------------------------------------------------- boxes, in one process


def numbered(layout: WeightLayout) -> Tensor:
    """The whole parameter, every element its own number."""
    shape = layout.params["w"].shape
    return torch.arange(math.prod(shape)).reshape(shape)


def box_of(full: Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
    return full[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]


@settings(max_examples=120, deadline=None, derandomize=True)
@given(layouts())
def test_ranges_are_what_a_rank_holds(layout: WeightLayout) -> None:
    full = numbered(layout)
    owners: dict[Any, set[int]] = {}
    for rank in range(layout.ranks):
        local = layout.shard("w", full, rank)
        copied = torch.full_like(local, -1)
        for part in layout.ranges("w", rank):
            assert 0 not in part.sizes
            assert (copied[part.where] == -1).all()
            copied[part.where] = box_of(full, part.offsets, part.sizes)
            owners.setdefault((part.offsets, part.sizes), set()).add(rank)
        assert torch.equal(copied, local)
    # Boxes of different ranks are the same or disjoint: all of them make up the whole once.
    assert sum(math.prod(sizes) for _, sizes in owners) == full.numel()


def components(mask: Tensor) -> int:
    """How many boxes a product of sets of indices needs."""
    count = 1
    for dim in range(mask.ndim):
        held = mask.movedim(dim, 0).reshape(mask.shape[dim], -1).any(1).tolist()
        count *= sum(now and not before for before, now in zip([False, *held], held, strict=False))
    return count


@settings(max_examples=80, deadline=None, derandomize=True)
@given(layouts())
def test_ranges_are_the_fewest(layout: WeightLayout) -> None:
    param = layout.params["w"]
    if len(param.segments) > 1:
        param = ParamLayout("w", param.shape, param.dtype, param.segments[:1], param.packed_dim)
        layout = WeightLayout(layout.axis_sizes, {"w": param})
    full = numbered(layout)
    for rank in range(layout.ranks):
        mask = torch.zeros(param.shape, dtype=torch.bool).flatten()
        mask[layout.shard("w", full, rank).flatten()] = True
        assert len(layout.ranges("w", rank)) == components(mask.reshape(param.shape))


def one(shape: tuple[int, ...], atoms: tuple[tuple[int, ...], ...], at: int, ranks: int) -> WeightLayout:
    """A parameter in one segment, divided at one atom."""
    segment = Segment(tuple((s,) for s in shape), tuple((0, s) for s in shape), atoms, (at,))
    return WeightLayout((ranks,), {"w": ParamLayout("w", shape, torch.int64, (segment,))})


def test_how_many_boxes() -> None:
    boxes = [(r.offsets, r.sizes) for r in one((8, 5), ((8,), (5,)), 0, 2).ranges("w", 1)]
    assert boxes == [((4, 0), (4, 5))]
    packed = one((2 * 6, 5), ((2, 6), (5,)), 1, 2)  # S(1/1): two boxes
    boxes = [(r.offsets, r.sizes) for r in packed.ranges("w", 1)]
    assert boxes == [((3, 0), (3, 5)), ((9, 0), (3, 5))]
    empty = WeightLayout((2,), {"w": whole_layout("w", torch.empty(0, 3), 1)})
    assert [r.sizes for r in empty.ranges("w", 1)] == [(0, 3)]
    scalar = WeightLayout((2,), {"w": whole_layout("w", torch.tensor(1.0), 1)})
    assert [(r.offsets, r.where) for r in scalar.ranges("w", 1)] == [((), ())]


def interleaved(ranks: int) -> WeightLayout:
    """``[..., ::2]`` and ``[..., 1::2]``, both divided."""
    halves = [((0, 6), (i, i + 1), (0, 4)) for i in range(2)]
    segments = tuple(Segment(((6, 2), (4,)), half, ((6,), (4,)), (0,)) for half in halves)
    return WeightLayout((ranks,), {"w": ParamLayout("w", (12, 4), torch.int64, segments)})


def test_an_interleaved_packing_is_one_box() -> None:
    layout = interleaved(2)
    assert len(layout.ranges("w", 1)) == 6
    (box,) = layout.pieced_boxes("w", 1)
    assert (box.offsets, box.sizes) == ((6, 0), (6, 4))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.bool, torch.int64])
def test_boxes_read_and_write_the_local_tensor(dtype: torch.dtype) -> None:
    layout = interleaved(2)
    full = (numbered(layout) % 2).to(dtype) if dtype == torch.bool else numbered(layout).to(dtype)
    local = layout.shard("w", full, 1)
    (box,) = layout.pieced_boxes("w", 1)
    joined = held_box(local, box)
    expected = box_of(full, box.offsets, box.sizes)
    for plain in (joined.cpu(), joined.clone(), joined.to("cpu")):
        assert type(plain) is Tensor
        assert torch.equal(plain.float(), expected.float())
    target = torch.zeros_like(local)
    for rows in ((0, 2), (2, 4)):
        part = held_box(target, box).narrow(0, *rows).narrow(1, 1, 3)
        part.detach().copy_(expected.narrow(0, *rows).narrow(1, 1, 3))
    assert torch.equal(target[:, 1:].float(), local[:, 1:].float())
    assert (target[:, 0].float() == 0).all()


# ------------------------------------------------------------------------- DCP's planners, without processes


def part(layout: WeightLayout, rank: int, local: Tensor, name: str = "w") -> ShardedParameter:
    """A rank's part of a parameter."""
    return ShardedParameter(local, weights_of(layout, rank).of(name))


def saved(layout: WeightLayout, full: Tensor) -> tuple[Metadata, dict[Any, Tensor]]:
    """What all ranks together write: DCP itself checks that it is the whole, once."""
    planners, plans = [], []
    for rank in range(layout.ranks):
        planner = dcp.DefaultSavePlanner()
        local = part(layout, rank, layout.shard("w", full, rank))
        planner.set_up_planner({"w": local}, is_coordinator=rank == 0)
        planners.append(planner)
        plans.append(planner.create_local_plan())
    final, metadata = planners[0].create_global_plan([*plans, SavePlan([], planner_data={})])
    assert len({i.index for p in final for i in p.items}) == sum(len(p.items) for p in final)
    stored = {
        item.index: planner.resolve_data(item).detach().cpu().clone()
        for planner, plan in zip(planners, final, strict=False)
        for item in planner.finish_plan(plan).items
    }
    return metadata, stored


def loaded(layout: WeightLayout, rank: int, metadata: Metadata, stored: dict[Any, Tensor]) -> Tensor:
    """What a rank reads of it."""
    local = torch.zeros(layout.local_shape("w", rank), dtype=next(iter(stored.values())).dtype)
    planner = dcp.DefaultLoadPlanner()
    planner.set_up_planner({"w": part(layout, rank, local)}, metadata)
    for item in planner.create_local_plan().items:
        source = narrow_tensor_by_index(stored[item.storage_index], item.storage_offsets, item.lengths)
        target = planner.resolve_tensor(item).detach()
        assert target.size() == source.size()
        target.copy_(source)
    return local


def others(shape: tuple[int, ...]) -> Iterator[WeightLayout]:
    """Other ways to lie: whole, and divided unevenly by three in each dimension."""
    yield WeightLayout((1,), {"w": whole_layout("w", torch.empty(shape), 1)})
    for dim in range(len(shape)):
        yield one(shape, tuple((s,) for s in shape), dim, 3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layouts())
def test_any_layout_loads_any_other(layout: WeightLayout) -> None:
    full = numbered(layout) + 1
    for other in others(tuple(full.shape)):
        for mine, theirs in ((layout, other), (other, layout)):
            metadata, stored = saved(mine, full)
            for rank in range(theirs.ranks):
                found = loaded(theirs, rank, metadata, stored)
                assert torch.equal(found, theirs.shard("w", full, rank))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_pieces_go_through_files(dtype: torch.dtype, tmp_path: Path) -> None:
    layout = interleaved(1)
    full = numbered(layout).to(dtype)
    local = layout.shard("w", full, 0)
    dcp.save({"w": part(layout, 0, local)}, checkpoint_id=str(tmp_path / "slices"), no_dist=True)
    dcp.save({"w": full}, checkpoint_id=str(tmp_path / "plain"), no_dist=True)
    for folder in ("slices", "plain"):
        plain, back = torch.zeros_like(full), torch.zeros_like(local)
        dcp.load({"w": plain}, checkpoint_id=str(tmp_path / folder), no_dist=True)
        dcp.load({"w": part(layout, 0, back)}, checkpoint_id=str(tmp_path / folder), no_dist=True)
        assert torch.equal(plain.float(), full.float())
        assert torch.equal(back.float(), local.float())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(layouts(), st.integers(2, 5))
def test_writing_is_spread(layout: WeightLayout, count: int) -> None:
    """Of equal parameters that ranks hold in common every rank writes its share."""
    params = {
        f"w{i}": whole_layout(f"w{i}", torch.empty(6), len(layout.axis_sizes)) for i in range(count * 6)
    }
    many = WeightLayout(layout.axis_sizes, params)
    planners = [dcp.DefaultSavePlanner() for _ in range(many.ranks)]
    for rank, planner in enumerate(planners):
        state = {name: part(many, rank, torch.empty(6), name) for name in params}
        planner.set_up_planner(state, is_coordinator=rank == 0)
    final, _ = planners[0].create_global_plan([planner.create_local_plan() for planner in planners])
    shares = [len(plan.items) for plan in final]
    assert sum(shares) == len(params)
    assert max(shares) - min(shares) <= 1


# -------------------------------------------------------------------------------------- models, on processes


@lru_cache
def planned(name: str, ranks: int) -> WeightLayout:
    """A model's layout, planned in this process."""
    return tpcompile.plan(build(name), ranks, example_kwargs=call(name, CAPTURED)).layout


def fewer(layout: WeightLayout, ranks: int) -> WeightLayout:
    """The same plan over fewer ranks: capturing again would take most of the time."""
    kept = (
        len(layout.axis_sizes) - 1 if layout.axis_sizes == (2, 2) and ranks == 2 else len(layout.axis_sizes)
    )
    axis_sizes = layout.axis_sizes[:kept] if kept < len(layout.axis_sizes) else (ranks,) + (1,) * (kept - 1)
    params = {
        name: replace(p, segments=tuple(replace(s, shards=s.shards[:kept]) for s in p.segments))
        for name, p in layout.params.items()
    }
    return WeightLayout(axis_sizes, params, layout.split_groups)


CASES = [
    ("llama", 4),
    ("tied", 4),
    ("phi3_unequal_segments", 4),
    ("falcon_gqa", 4),
    ("mixtral", 4),
    ("ffn_130", 3),
]


@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_save_and_load(name: str, ranks: int, tmp_path: Path) -> None:
    sharded, plain = str(tmp_path / "sharded"), str(tmp_path / "plain")
    whole = build(name)
    expected = {key: value.clone() for key, value in whole.state_dict().items()}
    layout = planned(name, ranks)
    sizes = run_spmd(spmd_checkpoint.save, ranks, name, layout.to_json(), sharded)
    total = sum(value.nbytes for value in expected.values())
    assert max(sizes) <= 1.5 * sum(sizes) / ranks
    assert total <= sum(sizes) <= 1.5 * total + 200_000  # every box once; a file has a kilobyte per box
    dcp.save(whole.state_dict(), checkpoint_id=plain, no_dist=True)
    for found in run_spmd(spmd_checkpoint.load, 2, name, fewer(layout, 2).to_json(), sharded, plain):
        assert all(found)
    spmd_checkpoint.spoil(whole)
    dcp.load(whole.state_dict(), checkpoint_id=sharded, no_dist=True)
    assert spmd_checkpoint.same(whole, expected)


def test_replicas_of_a_sharded_model(tmp_path: Path) -> None:
    """A mesh of two axes: two models over two ranks each save once; one rank holds all of the model."""
    folder, name = str(tmp_path / "replicas"), "falcon_gqa"
    layout = planned(name, 4)
    sizes = run_spmd(spmd_checkpoint.save, 4, name, fewer(layout, 2).to_json(), folder)
    whole = build(name)
    assert sum(sizes) <= 1.5 * sum(value.nbytes for value in whole.state_dict().values()) + 200_000
    for target in (layout, fewer(layout, 2), fewer(layout, 1)):
        for found in run_spmd(spmd_checkpoint.load, 4, name, target.to_json(), folder):
            assert all(found)


def test_training_goes_on(tmp_path: Path) -> None:
    """Two steps, a checkpoint, a third step; again from the checkpoint, in place, elsewhere and unsharded."""
    folder = str(tmp_path / "training")
    answers = run_spmd(spmd_checkpoint.train, 2, folder, timeout=TIMEOUT)
    for found in answers:
        for key in ("restored", "resumed", "async", "unchanged"):
            assert found[key], key
        assert found["tied once"] == 1
        check_errors(found["errors"])
        assert all(each.startswith("TpCompileError: ") for each in found["other states"])
    whole = build("tied")
    optimizer = spmd_checkpoint.adamw(whole)
    spmd_checkpoint.load_whole(whole, optimizer, folder)
    assert spmd_checkpoint.same(whole, answers[0]["full"])
    assert {float(entry["step"]) for entry in optimizer.state.values()} == {2.0}
    for found in run_spmd(
        spmd_checkpoint.resume_elsewhere, 3, fewer(planned("tied", 4), 3).to_json(), folder
    ):
        assert all(found)


def check_errors(messages: list[str]) -> None:
    """What every rank was told."""
    expected = [
        "TpCompileError: the checkpoint lacks model.norm.weight",
        "model.norm.weight ((7,) where the model has (40,))",
        "something else than the model in model.norm.weight",
        "TpCompileError",
        "the checkpoint lacks model.norm.weight",
        "Missing key in checkpoint state_dict: model.norm.weight",
        "Size mismatch",
        "TpCompileError: Linear is not sharded",
        "TpCompileError: the checkpoint's files cannot be read",
    ]
    for message, part in zip(messages, expected, strict=True):
        assert part in message

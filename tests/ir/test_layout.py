"""WeightLayout: what ranks hold makes up the parameter, bit by bit, however it is packed and divided."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tpcompile.errors import TpCompileError
from tpcompile.ir.layout.segment import Box, Segment
from tpcompile.ir.layout.weight_layout import ParamLayout, WeightLayout, whole_layout

AXES = [(1,), (2,), (3,), (5,), (2, 2), (2, 3), (2, 2, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool]


def _factorise(draw: st.DrawFn, size: int) -> tuple[int, ...]:
    """Some way to write a size as a product."""
    divisors = [d for d in range(2, size) if size % d == 0]
    if not divisors or draw(st.booleans()):
        return (size,)
    major = draw(st.sampled_from(divisors))
    return (major, *_factorise(draw, size // major))


def _segments(
    draw: st.DrawFn,
    factors: tuple[tuple[int, ...], ...],
    boxes: list[Box],
    packed: int,
    axis_sizes: tuple[int, ...],
) -> tuple[Segment, ...]:
    """Each segment divided in a way of its own along the packed dimension, like the others along the rest."""
    others = [_factorise(draw, math.prod(dim)) for dim in factors]
    along = [draw(st.none() | st.integers(0, len(factors) - 1)) for _ in axis_sizes]
    common = [None if d is None else draw(st.integers(0, len(others[d]) - 1)) for d in along]
    found = []
    for box in boxes:
        lengths = iter(stop - start for start, stop in box)
        shape = [math.prod(next(lengths) for _ in dim) for dim in factors]
        atoms = tuple(_factorise(draw, n) if d == packed else others[d] for d, n in enumerate(shape))
        starts = [sum(map(len, atoms[:d])) for d in range(len(atoms))]
        shards: list[int | None] = []
        for d, position in zip(along, common, strict=True):
            if d == packed:
                position = draw(st.none() | st.integers(0, len(atoms[d]) - 1))
            shards.append(None if d is None or position is None else starts[d] + position)
        found.append(Segment(factors, box, atoms, tuple(shards)))
    return tuple(found)


@st.composite
def layouts(draw: st.DrawFn) -> WeightLayout:
    """One parameter: whole, or packed along one factor of one dimension, divided anyhow."""
    axis_sizes = draw(st.sampled_from(AXES))
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 7, 12]), min_size=1, max_size=3)))
    packed = draw(st.integers(0, len(shape) - 1))
    factors = tuple(_factorise(draw, size) if d == packed else (size,) for d, size in enumerate(shape))
    whole = tuple((0, size) for dim in factors for size in dim)
    first = sum(len(dim) for dim in factors[:packed])
    at = draw(st.integers(first, first + len(factors[packed]) - 1))
    size = whole[at][1]
    cuts = sorted(draw(st.sets(st.integers(1, size - 1), max_size=3))) if size > 1 else []
    ranges = list(zip([0, *cuts], [*cuts, size], strict=True))
    boxes = [(*whole[:at], r, *whole[at + 1 :]) for r in ranges]
    segments = _segments(draw, factors, boxes, packed, axis_sizes)
    dtype = draw(st.sampled_from(DTYPES))
    return WeightLayout(axis_sizes, {"w": ParamLayout("w", shape, dtype, segments, packed)})


def _random(layout: WeightLayout) -> Tensor:
    param = layout.params["w"]
    count = torch.arange(math.prod(param.shape)).reshape(param.shape)
    return count % 2 == 1 if param.dtype == torch.bool else count.to(param.dtype)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(layouts())
def test_ranks_hold_the_whole(layout: WeightLayout) -> None:
    full = _random(layout)
    parts = {rank: layout.shard("w", full, rank) for rank in range(layout.ranks)}
    assert torch.equal(layout.assemble("w", parts), full)
    for rank, part in parts.items():
        assert tuple(part.shape) == layout.local_shape("w", rank)
        assert part.is_contiguous()
        assert part.dtype == full.dtype
        segments = layout.segments_of("w", part, rank)
        assert [tuple(s.shape) for s in segments] == layout.segment_shapes("w", rank)
    assert sum(layout.held(rank) for rank in parts) == sum(p.nbytes for p in parts.values())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layouts())
def test_every_element_is_held(layout: WeightLayout) -> None:
    """Exactly as often as there are ranks that divide nothing between them."""
    param = layout.params["w"]
    numbers = torch.arange(math.prod(param.shape)).reshape(param.shape)
    held = torch.cat([layout.shard("w", numbers, rank).flatten() for rank in range(layout.ranks)])
    copies = torch.bincount(held, minlength=numbers.numel())
    assert copies.min() >= 1
    for segment in param.segments:
        undivided = math.prod(a for a, s in zip(layout.axis_sizes, segment.shards, strict=True) if s is None)
        (mine,) = [segment.take(numbers, tuple((0, a) for dim in segment.atoms for a in dim))]
        assert set(copies[mine.flatten()].tolist()) == {undivided}


@settings(max_examples=100, deadline=None, derandomize=True)
@given(layouts())
def test_json(layout: WeightLayout) -> None:
    assert WeightLayout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


@settings(max_examples=50, deadline=None, derandomize=True)
@given(layouts())
def test_shards_share_no_memory(layout: WeightLayout) -> None:
    full = _random(layout)
    layout.shard("w", full, 0).fill_(1)
    assert torch.equal(full, _random(layout))


def _heads(ranks: int) -> WeightLayout:
    segment = Segment(((42,), (3,)), ((0, 42), (0, 3)), ((14, 3), (3,)), (0,))
    return WeightLayout((ranks,), {"w": ParamLayout("w", (42, 3), torch.float32, (segment,))})


def test_the_unit_is_a_head() -> None:
    """14 heads on 4 ranks are 4, 4, 3, 3; a rank beyond the last head holds nothing."""
    assert [_heads(4).local_shape("w", r)[0] // 3 for r in range(4)] == [4, 4, 3, 3]
    assert [_heads(16).local_shape("w", r) for r in (0, 13, 14, 15)] == [(3, 3), (3, 3), (0, 3), (0, 3)]
    full = torch.randn(42, 3)
    for ranks in (4, 16):
        layout = _heads(ranks)
        parts = {r: layout.shard("w", full, r) for r in range(ranks)}
        assert torch.equal(layout.assemble("w", parts), full)


def test_interleaved_packing() -> None:
    """``[..., ::2]`` is one factor of two; per head ``[q k v]`` is a middle factor of three."""
    full = torch.arange(12).reshape(12, 1)
    factors, axis_sizes = ((2, 3, 2), (1,)), (2,)
    boxes = [((0, 2), (i, i + 1), (0, 2), (0, 1)) for i in range(3)]
    segments = tuple(Segment(factors, box, ((2, 2), (1,)), (0,)) for box in boxes)
    layout = WeightLayout(axis_sizes, {"w": ParamLayout("w", (12, 1), torch.int64, segments)})
    assert layout.shard("w", full, 0).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert layout.shard("w", full, 1).flatten().tolist() == [6, 7, 8, 9, 10, 11]
    assert [s.flatten().tolist() for s in layout.segments_of("w", layout.shard("w", full, 1), 1)] == [
        [6, 7],
        [8, 9],
        [10, 11],
    ]


def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(TpCompileError, match=r"shape \(42, 4\) where the plan has \(42, 3\)"):
        _heads(2).shard("w", torch.zeros(42, 4), 0)


def test_scalars_and_empty_parameters_are_whole() -> None:
    for full in (torch.tensor(2.5), torch.empty(0, 3)):
        layout = WeightLayout((2, 2), {"w": whole_layout("w", full, 2)})
        assert all(torch.equal(layout.shard("w", full, r), full) for r in range(4))
        assert torch.equal(layout.assemble("w", {r: full for r in range(4)}), full)

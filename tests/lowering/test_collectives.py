"""The collectives against their definitions, on 2 and 3 ranks: values, gradients, compiled, AOT graphs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.partitioners import min_cut_rematerialization_partition as min_cut
from torch.nn import functional as F

import tpcompile.lowering.collectives  # noqa: F401  (registers the operators)
from tests.helpers.run_ranks import SpmdError, run_spmd
from tpcompile.errors import TpCompileError

OPS = torch.ops.tpcompile
Tensors = list[Tensor]
Fn = Callable[[Tensor], Tensor]

# Every rank can compute every rank's input and output gradient, so that the expected result of a
# collective is a plain formula over lists: xs and gs by rank.
EVEN = {2: [2, 2], 3: [2, 2, 2]}
UNEVEN = {2: [3, 1], 3: [2, 4, 1]}
EMPTY = {2: [0, 3], 3: [2, 0, 1]}
NOTHING = {2: [0, 0], 3: [0, 0, 0]}
SPLITS = {"even": EVEN, "uneven": UNEVEN, "empty": EMPTY, "nothing": NOTHING}
MOVES = ["all_gather", "reduce_scatter", "take_shard", "pad_shard"]
LOCAL_INPUT = {"all_gather", "pad_shard"}
WHOLE = ["all_reduce", "copy_to_ranks", "keep_first"]
INEXACT = [torch.float32, torch.float64, torch.bfloat16]


def _group() -> str:
    return dist.group.WORLD.group_name  # type: ignore[union-attr]


def _data(rank: int, shape: list[int], dtype: torch.dtype, strided: bool) -> Tensor:
    """Small whole numbers, the same on every rank that asks, whose sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(17 * rank + sum(shape))
    order = list(reversed(shape)) if strided else shape
    x = torch.randint(-4, 5, order, generator=generator)
    x = (x > 0) if dtype == torch.bool else x.to(dtype)
    return x.permute(*reversed(range(len(shape)))) if strided else x


def _call(op: str, dim: int, sizes: list[int], rank: int) -> Fn:
    g = _group()
    if op == "all_reduce":
        return lambda x: OPS.all_reduce.default(x, g)
    if op == "copy_to_ranks":
        return lambda x: OPS.copy_to_ranks.default(x, g)
    if op == "keep_first":
        return lambda x: OPS.keep_first.default(x, rank)
    if op == "pad_shard":
        return lambda x: OPS.pad_shard.default(x, dim, sizes, rank)
    overload = getattr(OPS, op).default
    return lambda x: overload(x, g, dim, sizes, rank)


def _piece(x: Tensor, dim: int, sizes: list[int], rank: int) -> Tensor:
    return x.split(sizes, dim)[rank]


def _padded(x: Tensor, dim: int, sizes: list[int], rank: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = sum(sizes)
    whole = torch.zeros(shape, dtype=x.dtype)
    whole.split(sizes, dim)[rank].copy_(x)
    return whole


def _expected(op: str, xs: Tensors, dim: int, sizes: list[int], r: int) -> Tensor:
    return {
        "all_reduce": lambda: sum(xs),
        "copy_to_ranks": lambda: xs[r],
        "keep_first": lambda: xs[r] if r == 0 else torch.zeros_like(xs[r]),
        "all_gather": lambda: torch.cat(xs, dim),
        "reduce_scatter": lambda: _piece(sum(xs), dim, sizes, r),  # type: ignore[arg-type]
        "take_shard": lambda: _piece(xs[r], dim, sizes, r),
        "pad_shard": lambda: _padded(xs[r], dim, sizes, r),
    }[op]()  # type: ignore[return-value]


def _expected_gradient(op: str, gs: Tensors, dim: int, sizes: list[int], r: int) -> Tensor:
    return {
        "all_reduce": lambda: gs[r],
        "copy_to_ranks": lambda: sum(gs),
        "keep_first": lambda: gs[r],
        "all_gather": lambda: _piece(gs[r], dim, sizes, r),
        "reduce_scatter": lambda: torch.cat(gs, dim),
        "take_shard": lambda: torch.cat(gs, dim),
        "pad_shard": lambda: _piece(gs[r], dim, sizes, r),
    }[op]()  # type: ignore[return-value]


def _same(what: str, got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype and got.shape == wanted.shape, f"{what}: {got.shape}, not {wanted.shape}"
    assert torch.equal(got, wanted), f"{what}:\n{got}\nnot\n{wanted}"


def _check_one(
    op: str, fn: Fn, dim: int, sizes: list[int], rows: int, dtype: torch.dtype, strided: bool
) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    what = f"{op} dim={dim} sizes={sizes} rows={rows} {dtype} strided={strided}"
    shapes = [_shape(rows, dim, sizes[r] if op in LOCAL_INPUT else sum(sizes)) for r in range(ranks)]
    xs = [_data(r, shapes[r], dtype, strided) for r in range(ranks)]
    x = xs[rank].detach().requires_grad_(dtype in INEXACT)
    with torch.inference_mode():
        _same(f"{what} inference", fn(xs[rank]), _expected(op, xs, dim, sizes, rank))
    y = fn(x)
    _same(what, y, _expected(op, xs, dim, sizes, rank))
    if dtype in INEXACT:
        of_rank = [_expected(op, xs, dim, sizes, r).shape for r in range(ranks)]
        gs = [_data(r + 50, list(of_rank[r]), dtype, strided) for r in range(ranks)]
        y.backward(gs[rank])
        assert x.grad is not None
        _same(f"{what} gradient", x.grad, _expected_gradient(op, gs, dim, sizes, rank))


def _shape(rows: int, dim: int, size: int) -> list[int]:
    shape = [rows, 3, 5]
    shape[dim] = size
    return shape


def check_eager(op: str, dtype: torch.dtype) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for split in SPLITS.values():
        for dim in (0, 1, -1):
            for strided in (False, True):
                sizes = split[ranks]
                _check_one(op, _call(op, dim, sizes, rank), dim, sizes, 4, dtype, strided)


def check_compiled(op: str) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for sizes in (EVEN[ranks], EMPTY[ranks]):
        torch._dynamo.reset()
        counters.clear()
        fn = torch.compile(_call(op, 1, sizes, rank), fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (8, 9, 7):  # like no other size, or they would share a symbol
            _check_one(op, fn, 1, sizes, rows, torch.float32, False)
        # One for inference and one for training, whatever the number of rows.
        assert counters["stats"]["unique_graphs"] == 2, counters["stats"]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("op", WHOLE + MOVES)
def test_values_and_gradients(op: str, ranks: int) -> None:
    run_spmd(check_eager, ranks, op, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "reduce_scatter", "keep_first", "pad_shard"])
def test_other_dtypes(op: str, dtype: torch.dtype) -> None:
    if dtype == torch.bool and op in ("all_reduce", "reduce_scatter"):
        with pytest.raises(SpmdError) as caught:
            run_spmd(check_eager, 2, op, dtype)
        assert isinstance(caught.value.__cause__, TpCompileError)
    else:
        run_spmd(check_eager, 2, op, dtype)


@pytest.mark.parametrize("op", WHOLE + MOVES)
def test_compiled(op: str) -> None:
    run_spmd(check_compiled, 3, op)


def _check_all_to_all(
    fn: Fn, src: int, dst: int, sizes: tuple[list[int], list[int]], rows: int, dtype: torch.dtype
) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    (src_sizes, dst_sizes), free = sizes, ({0, 1, 2} - {src % 3, dst % 3}).pop()

    def shape(s: int, d: int) -> list[int]:
        out = [0, 0, 0]
        out[src], out[dst], out[free] = s, d, rows
        return out

    for strided in (False, True):
        xs = [_data(r, shape(src_sizes[r], sum(dst_sizes)), dtype, strided) for r in range(ranks)]
        x = xs[rank].detach().requires_grad_(dtype in INEXACT)
        y = fn(x)
        _same("all_to_all", y, torch.cat([_piece(a, dst, dst_sizes, rank) for a in xs], src))
        if dtype in INEXACT:
            gs = [_data(r + 50, shape(sum(src_sizes), dst_sizes[r]), dtype, strided) for r in range(ranks)]
            y.backward(gs[rank])
            assert x.grad is not None
            _same("its gradient", x.grad, torch.cat([_piece(g, src, src_sizes, rank) for g in gs], dst))


def _call_all_to_all(src: int, dst: int, src_sizes: list[int], dst_sizes: list[int]) -> Fn:
    group, rank = _group(), dist.get_rank()
    return lambda x: OPS.all_to_all.default(x, group, src, dst, src_sizes, dst_sizes, rank)


def check_all_to_all(dtype: torch.dtype) -> None:
    ranks = dist.get_world_size()
    for src, dst in [(0, 1), (1, 0), (0, 2), (2, 1), (-1, 0)]:
        for a, b in product(SPLITS.values(), SPLITS.values()):
            fn = _call_all_to_all(src, dst, a[ranks], b[ranks])
            _check_all_to_all(fn, src, dst, (a[ranks], b[ranks]), 4, dtype)


def check_compiled_all_to_all() -> None:
    ranks = dist.get_world_size()
    for a, b in [(EVEN[ranks], UNEVEN[ranks]), (EMPTY[ranks], EMPTY[ranks])]:
        torch._dynamo.reset()
        counters.clear()
        fn = torch.compile(_call_all_to_all(1, 2, a, b), fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (8, 9, 10):
            _check_all_to_all(fn, 1, 2, (a, b), rows, torch.float32)
        assert counters["stats"]["unique_graphs"] <= 2, counters["stats"]  # contiguous and strided


@pytest.mark.parametrize("ranks", [2, 3])
def test_all_to_all(ranks: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        run_spmd(check_all_to_all, ranks, dtype)


def test_compiled_all_to_all() -> None:
    run_spmd(check_compiled_all_to_all, 3)


def _parts(unknown: bool) -> Tensors:
    """What each of all ranks has: few different numbers, so that some tie, and NaN on the last if asked."""
    ranks = dist.get_world_size()
    xs = [_data(r, [4, r + 1, 2], torch.float64, False) // 3 for r in range(ranks)]
    if unknown:
        xs[-1][0, 0] = torch.nan
    return xs


def _extremes(group: str) -> dict[str, tuple[Fn, Callable[[Tensor, Tensor], Tensor]]]:
    """Reductions of whole values, and what completes them from a part and its extreme."""
    return {
        "amax": (
            lambda x: x.amax((1, 2)),
            lambda x, y: OPS.extreme.default(y, group, "max", x, [1, 2], False),
        ),
        "amin": (
            lambda x: x.amin(1, keepdim=True),
            lambda x, y: OPS.extreme.default(y, group, "min", x, [1], False),
        ),
        "max": (lambda x: x.max(), lambda x, y: OPS.extreme.default(y, group, "max", x, [0, 1, 2])),
        "min": (lambda x: x.min(), lambda x, y: OPS.extreme.default(y, group, "min", x, [0, 1, 2])),
    }


def check_extreme() -> None:
    rank, group = dist.get_rank(), _group()
    for (name, (reduce, complete)), unknown in product(_extremes(group).items(), (False, True)):
        parts = [x.requires_grad_() for x in _parts(unknown)]
        whole = reduce(torch.cat(parts, 1))
        seed = _data(0, list(whole.shape), torch.float64, False) + 0.5
        (wanted,) = torch.autograd.grad(whole, [parts[rank]], seed)
        for run in (complete, torch.compile(complete, backend="aot_eager", fullgraph=True)):
            y = run(parts[rank], reduce(parts[rank]))
            (got,) = torch.autograd.grad(y, [parts[rank]], seed)
            for what, a, b in (("value", y, whole), ("gradient", got, wanted)):
                torch.testing.assert_close(
                    a, b, equal_nan=True, msg=lambda m, w=what, n=name: f"{n} {w}: {m}"
                )


def check_extreme_alone() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    x = torch.tensor([1.0, 2.0]) * (rank + 1)
    assert OPS.extreme.default(x > 1, _group(), "max").tolist() == [True, True]
    assert OPS.extreme.default(x.int(), _group(), "min").tolist() == [1, 2]
    assert OPS.extreme.default(x.bfloat16(), _group(), "max").tolist() == [ranks, 2 * ranks]
    tied = torch.tensor([5.0, float(rank)], requires_grad=True)
    OPS.extreme.default(tied, _group(), "max").sum().backward()
    assert tied.grad is not None
    torch.testing.assert_close(tied.grad, torch.tensor([1 / ranks, float(rank == ranks - 1)]))


@pytest.mark.parametrize("ranks", [2, 3])
def test_extremes_over_ranks(ranks: int) -> None:
    run_spmd(check_extreme, ranks)
    run_spmd(check_extreme_alone, ranks)


def check_wrong_size() -> None:
    OPS.all_gather.default(torch.ones(3, 2), _group(), 0, [2, 2], dist.get_rank())


def test_a_wrong_size_is_refused() -> None:
    with pytest.raises(SpmdError, match="expects size 2 in dimension 0"):
        run_spmd(check_wrong_size, 2)


def capture_graphs(training: bool) -> list[list[str]]:
    """Targets of the graphs that a compiler gets below AOTAutograd, for Megatron's divided MLP."""
    graphs: list[list[str]] = []

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in gm.graph.nodes if node.op == "call_function"])
        return torch._dynamo.backends.debugging.boxed_nop(gm, inputs)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, partition_fn=min_cut)
    x, up, down = torch.randn(3, 4), torch.randn(5, 4), torch.randn(4, 5)
    if training:
        x, up, down = (t.requires_grad_() for t in (x, up, down))
    y = torch.compile(_mlp, fullgraph=True, backend=backend)(x, up, down, _group(), training)
    if training:
        y.sum().backward()
    return graphs


def _mlp(x: Tensor, up: Tensor, down: Tensor, group: str, training: bool = True) -> Tensor:
    x = OPS.copy_to_ranks.default(x, group) if training else x
    return OPS.all_reduce.default(F.linear(F.gelu(F.linear(x, up)), down), group)


def test_aot_graphs_hold_functional_collectives_and_no_copy() -> None:
    for (inference,) in run_spmd(capture_graphs, 2, False):
        assert inference.count("_c10d_functional.all_reduce.default") == 1
        assert not [t for t in inference if "tpcompile" in t or "clone" in t]
    for forward, backward in run_spmd(capture_graphs, 2, True):
        assert forward.count("_c10d_functional.all_reduce.default") == 1
        assert backward.count("_c10d_functional.all_reduce.default") == 1
        assert not [t for t in forward + backward if "tpcompile" in t or "clone" in t]


def _block(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x + F.linear(F.gelu(F.linear(x, up)), down)


def check_whole_block() -> None:
    """A residual MLP block divided in Megatron's way has the gradients of the whole block."""
    rank, ranks, group = dist.get_rank(), dist.get_world_size(), _group()
    rows, hidden = UNEVEN[ranks], EMPTY[ranks]
    x = torch.randn(sum(rows), 4, dtype=torch.float64, requires_grad=True)
    up = torch.randn(sum(hidden), 4, dtype=torch.float64, requires_grad=True)
    down = torch.randn(4, sum(hidden), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(sum(rows), 4, dtype=torch.float64)
    out = _block(x, up, down)
    (out * weight).sum().backward()

    local_up = _piece(up.detach(), 0, hidden, rank).clone().requires_grad_()
    local_down = _piece(down.detach(), 1, hidden, rank).clone().requires_grad_()
    local_x = x.detach().clone().requires_grad_()
    y = OPS.copy_to_ranks.default(local_x, group)
    y = OPS.keep_first.default(local_x, rank) + F.linear(F.gelu(F.linear(y, local_up)), local_down)
    y = OPS.all_reduce.default(y, group)
    (y * weight).sum().backward()
    assert x.grad is not None and up.grad is not None and down.grad is not None
    torch.testing.assert_close(y, out)
    torch.testing.assert_close(local_x.grad, x.grad)
    torch.testing.assert_close(local_up.grad, _piece(up.grad, 0, hidden, rank))
    torch.testing.assert_close(local_down.grad, _piece(down.grad, 1, hidden, rank))


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_divided_block_has_the_gradients_of_the_whole(ranks: int) -> None:
    run_spmd(check_whole_block, ranks)

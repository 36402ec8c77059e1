"""Weights whose blocks have scales: their numbers, and what can be done with them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.helpers.quantised import E4M3, spread
from tpcompile import TpCompileError
from tpcompile.ir.block_scaled import BlockScaled

TYPES = [torch.bfloat16, torch.float32, torch.float16]


def random(*shape: int, block: tuple[int, int] = (4, 8), dtype: torch.dtype = torch.float32) -> BlockScaled:
    """A weight in fp8."""
    draw = torch.Generator().manual_seed(0)
    grid = [-(-n // b) for n, b in zip(shape[-2:], block, strict=True)]
    scale = torch.rand(*shape[:-2], *grid, generator=draw)
    return BlockScaled.of(torch.randn(shape, generator=draw).to(E4M3), scale, block, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_every_number_of_mxfp4(dtype: torch.dtype) -> None:
    """All bytes with all exponents: bit by bit transformers' numbers. The exponent 255 is none."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16)
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16)
    found = BlockScaled.of(blocks.flatten(2), scales, (1, 32), dtype, (0, 2, 1)).dequantize().contiguous()
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert found.dtype == expected.dtype
    assert torch.equal(found[..., :255].signbit(), expected[..., :255].signbit())
    assert torch.equal(found[..., :255], expected[..., :255])
    assert not found[..., 255].isfinite().any()


@pytest.mark.parametrize("shape", [(8, 16), (9, 16), (8, 20), (9, 20), (3, 9, 16)])
def test_blocks_that_are_cut_short(shape: tuple[int, ...]) -> None:
    for dtype in TYPES:
        weight = random(*shape, dtype=dtype)
        parts = (part.reshape(-1, *part.shape[-2:]) for part in (weight.qdata, weight.scale))
        pairs = zip(*parts, strict=True)
        expected = torch.stack([(q.float() * spread(s, (4, 8), q.shape)).to(dtype) for q, s in pairs])
        assert torch.equal(weight.dequantize(), expected.view(shape))


def test_scales_that_are_exponents() -> None:
    weight = random(8, 16)
    powers = weight.scale.log2().ceil().exp2()
    expected = BlockScaled.of(weight.qdata, powers, (4, 8), torch.float32).dequantize()
    bytes_ = powers.to(torch.float8_e8m0fnu)
    for scale in (bytes_, bytes_.view(torch.uint8)):
        assert torch.equal(BlockScaled.of(weight.qdata, scale, (4, 8), torch.float32).dequantize(), expected)


X, IDS = torch.randn(5, 16), torch.tensor([2, 0, 2])
OPERATIONS: dict[str, Callable[[Any], Tensor]] = {
    "linear": lambda w: F.linear(X, w[1]),
    "matmul": lambda w: X @ w.transpose(-2, -1),
    "baddbmm": lambda w: torch.baddbmm(torch.ones(1), X.expand(3, 5, 16), w.mT),
    "experts": lambda w: torch.bmm(w[IDS], X[:3, :, None]),
    "transposed experts": lambda w: torch.bmm(X[:3, None], w.permute(0, 2, 1)[IDS]),
    "einsum": lambda w: torch.einsum("bk,enk->ben", X, w),
    "embedding": lambda w: F.embedding(IDS, w[0]),
    "slice": lambda w: w[:, 2:5],
    "cast": lambda w: w.to(torch.float64) * 2,
    "reduce": lambda w: w.sum(-1),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str) -> None:
    """As on the dequantised weight, whether gradients are recorded or not."""
    weight = nn.Parameter(random(3, 8, 16), requires_grad=False)
    want = OPERATIONS[name](weight.dequantize())
    with torch.no_grad():
        assert torch.equal(OPERATIONS[name](weight), want)
    assert torch.equal(OPERATIONS[name](weight), want)


def test_gradients_go_through() -> None:
    weight, found = random(8, 16), []
    for one in (nn.Parameter(weight, requires_grad=False), weight.dequantize()):
        x = X.clone().requires_grad_()
        F.linear(x, one).square().sum().backward()
        found.append(x.grad)
    assert torch.equal(*found)  # type: ignore[arg-type]


def test_what_stays_quantised() -> None:
    """Copies, a few experts that are chosen, and transposed ones."""
    weight = random(4, 8, 16)
    assert type(weight[torch.arange(4)]) is Tensor
    for one in (weight.clone(), weight.detach(), weight[IDS], weight.mT, weight.to("meta")):
        assert isinstance(one, BlockScaled)
    assert weight.mT[IDS].shape == (3, 16, 8) and weight.mT[IDS].qdata.shape == (3, 8, 16)
    both = torch.cat([weight, weight], 1)
    assert isinstance(both, BlockScaled)
    assert all(torch.equal(one.dequantize(), weight.dequantize()) for one in both.chunk(2, 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(2),
        lambda w: operator.iadd(w, 1),
        lambda w: operator.itruediv(w.data, 2),
        lambda w: w.zero_(),
        lambda w: w.copy_(torch.zeros(8, 16)),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: setattr(w, "data", torch.zeros(8, 16)),
        lambda w: nn.init.normal_(w),
        lambda w: torch.ops.aten.mul_.Tensor(w, torch.ones(())),
        lambda w: F.relu(w, inplace=True),
        lambda w: torch.add(X[0], 1, out=w),
    ],
)
def test_changes_are_refused(change: Callable[[Any], Any]) -> None:
    weight = random(8, 16)
    before = weight.dequantize()
    with pytest.raises(TpCompileError, match="would be changed"), torch.no_grad():
        change(weight)
    assert torch.equal(weight.dequantize(), before)


@pytest.mark.parametrize(
    "join",
    [
        lambda w: torch.cat([w, w], 0),
        lambda w: torch.cat([w, w.dequantize()], 1),
        lambda w: torch.stack([w, w], 1),
        lambda w: torch.stack([w, random(9, 16, block=(3, 8))]),
        lambda w: w.chunk(3),
    ],
)
def test_joins_that_would_cut_blocks_are_refused(join: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match="quantised weight"):
        join(random(9, 16))
    with pytest.raises(ValueError, match="scales of shape"):
        BlockScaled.of(torch.zeros(8, 16).to(E4M3), torch.ones(3, 2), (4, 8), torch.float32)

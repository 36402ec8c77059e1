"""Linear layers over bitsandbytes' packed weights, as operators: its own kernels, on a part of the weight.

bitsandbytes keeps a weight as one row of bytes, and names its size in every call. Here it has the form of a
matrix, so that a part of it is a weight like the whole.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import register_flop_formula

_KNOWN = (torch.float16, torch.bfloat16, torch.float32)


@torch.library.custom_op("tpcompile::linear_4bit", mutates_args=())
def linear_4bit(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None, block: int, code: str
) -> Tensor:
    """A linear layer over numbers of 4 bits.

    Args:
        x: of shape [..., columns].
        packed: bytes of two numbers, the first in the high bits, of shape [rows, columns / 2].
        scales: float32, of shape [rows, columns / block].
        bias: of shape [rows], or None.
        block: how many numbers of a row have one scale.
        code: ``"nf4"`` or ``"fp4"``.

    Returns:
        A tensor of shape [..., rows], in the type of ``x``.
    """
    if x.dtype not in _KNOWN or not x.numel():  # verify computes in double
        return linear(x, dequantise_4bit(packed, scales, block, code, x.dtype), bias)
    flat, size = packed.contiguous().view(-1, 1), [packed.shape[0], 2 * packed.shape[1]]
    made: Tensor = _kernels().gemm_4bit(x, flat, size, scales.reshape(-1), block, code, bias)
    return made


def dequantise_4bit(packed: Tensor, scales: Tensor, block: int, code: str, dtype: torch.dtype) -> Tensor:
    """The weight of ``linear_4bit`` as a matrix."""
    known = dtype if dtype in _KNOWN else torch.float32
    size = [packed.shape[0], 2 * packed.shape[1]]
    flat, single = packed.contiguous().view(-1, 1), scales.reshape(-1).float()
    made: Tensor = _kernels().dequantize_4bit(flat, single, block, code, size, known)
    return made.to(dtype)


@torch.library.custom_op("tpcompile::linear_8bit", mutates_args=())
def linear_8bit(
    x: Tensor, numbers: Tensor, scales: Tensor, bias: Tensor | None, threshold: float, training: bool
) -> Tensor:
    """A linear layer over numbers of 8 bits, to which ``x`` is rounded too: LLM.int8 (Dettmers et al. 2022).

    Args:
        x: of shape [..., columns].
        numbers: int8, of shape [rows, columns].
        scales: float32, what 127 stands for in each row, of shape [rows].
        bias: of shape [rows], or None.
        threshold: columns in which some number of ``x`` is as large as this are not rounded; 0: all are.
        training: without a GPU ``x`` is not rounded then, as bitsandbytes does it. The device is looked at
            here, because a model may be captured on ``meta``.

    Returns:
        A tensor of shape [..., rows], in the type of ``x``.
    """
    if training and x.device.type in ("cpu", "xpu"):
        return linear(x, dequantise_8bit(numbers, scales, x.dtype), bias)
    kernels, kind = _kernels(), x.dtype if x.dtype in _KNOWN else torch.float32
    flat, scales = x.reshape(-1, x.shape[-1]).to(kind), scales.float()
    bias = None if bias is None else bias.to(kind)
    # A copy: the kernel writes into it for a while.
    rounded, sizes, outliers = kernels.int8_vectorwise_quant(flat.to(torch.float16, copy=True), threshold)
    if threshold:
        made = kernels.int8_mixed_scaled_mm(flat, rounded, numbers, sizes, scales, outliers, bias)[0]
    else:
        made = kernels.int8_scaled_mm(rounded, numbers, sizes, scales, bias=bias, dtype=kind)
    result: Tensor = made.to(x.dtype).reshape(*x.shape[:-1], numbers.shape[0])
    return result


def dequantise_8bit(numbers: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight of ``linear_8bit`` as a matrix."""
    return (numbers.to(dtype) * (scales[:, None] * (1.0 / 127.0))).to(dtype)


def _kernels() -> Any:
    importlib.import_module("bitsandbytes")  # registers its operators
    return torch.ops.bitsandbytes


@linear_4bit.register_fake
def _(x: Tensor, packed: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@linear_8bit.register_fake
def _(x: Tensor, numbers: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], numbers.shape[0]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, scales, _, *ctx.options = inputs
    ctx.save_for_backward(weight, scales)


def _gradients(ctx: Any, grad: Tensor, weight: Callable[..., Tensor], *options: Any) -> tuple[Any, ...]:
    """Those of ``x`` and of the bias; the weight is dequantised again, as bitsandbytes does it."""
    wants = ctx.needs_input_grad
    over = tuple(range(grad.ndim - 1))
    x = grad @ weight(*ctx.saved_tensors, *options, grad.dtype) if wants[0] else None
    bias = (grad.sum(over) if over else grad) if wants[3] else None
    return (x, None, None, bias, *[None] * len(ctx.options))


linear_4bit.register_autograd(
    lambda ctx, grad: _gradients(ctx, grad, dequantise_4bit, *ctx.options), setup_context=_keep
)
linear_8bit.register_autograd(lambda ctx, grad: _gradients(ctx, grad, dequantise_8bit), setup_context=_keep)


@register_flop_formula([torch.ops.tpcompile.linear_4bit, torch.ops.tpcompile.linear_8bit])
def _operations(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Those of the multiplication."""
    return 2 * int(torch.Size(x).numel()) * int(weight[0])

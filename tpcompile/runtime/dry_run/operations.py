"""The arithmetic and the memory traffic of one operator, from the tensors that it is given and returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from tpcompile.ir.torch_internals import OpOverload

aten = torch.ops.aten

_LOOKUPS = (aten.embedding, aten.index, aten.index_select, aten.gather)
"""They read as many elements of their first operand as they return."""

_COPIES = (aten.clone, aten.copy_, aten._to_copy, aten.where, aten.zeros_like, aten.constant_pad_nd)
"""What a compiler fuses beside the operators that torch calls pointwise."""


def arithmetic(func: OpOverload, args: Sequence[Any], result: Any) -> float:
    """Operations of a matmul, convolution or attention (a multiplication and an addition are two); else 0.

    Attention counts without regard to its mask, as in torch's own counter.
    """
    packet = func.overloadpacket
    if packet is aten._scaled_dot_product_flash_attention_for_cpu:
        return float(sdpa_flop_count(*(x.shape for x in args[:3])))
    if packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return float(sdpa_backward_flop_count(*(x.shape for x in args[:4])))
    if packet is aten._grouped_mm:
        return _grouped(args[0], args[1])
    formula = flop_registry.get(packet)
    return float(formula(*args, out_val=result)) if formula is not None else 0.0


def _grouped(a: Tensor, b: Tensor) -> float:
    """A row meets one expert only."""
    return 2.0 * math.prod(a.shape[-2:]) * b.shape[-1]


def traffic(func: OpOverload, given: Sequence[Tensor], returned: Sequence[Tensor]) -> float:
    """Bytes that an operator reads and writes, if nothing is kept in a cache.

    Of experts those are read that some row can have chosen, at most one for each row.
    """
    written = sum(map(extent, returned))
    packet = func.overloadpacket
    if packet in _LOOKUPS:
        return 2 * written + sum(map(extent, given[1:]))
    read = float(sum(map(extent, given)))
    if packet is aten._grouped_mm and given[1].ndim == 3:
        experts, rows = given[1].shape[0], given[0].shape[0]
        read -= extent(given[1]) * (1 - min(experts, rows) / experts)
    return read + written


def extent(value: Tensor) -> int:
    """Bytes of memory behind a tensor: what is expanded counts once."""
    sizes = [size for size, stride in zip(value.shape, value.stride(), strict=True) if stride]
    return math.prod(sizes) * value.element_size() if value.numel() else 0


def is_fused(func: OpOverload) -> bool:
    """Whether a compiler would fuse an operator with others, so that its traffic goes."""
    return torch.Tag.pointwise in func.tags or func.overloadpacket in _COPIES

"""Clips gradients by the norm of the whole ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tpcompile.errors import TpCompileError
from tpcompile.ir.layout.index_ranges import copied_along

if TYPE_CHECKING:
    from .runtime import Runtime


def clip_gradients(
    model: nn.Module, runtime: Runtime, max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    """Scales all gradients so that their norm is at most ``max_norm``; returns the norm before."""
    params = [p for p in model.parameters() if p.grad is not None]
    total = _total_norm(model, runtime, norm_type)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(f"the norm of the gradients is {float(total)}")
    torch.nn.utils.clip_grads_with_norm_(params, max_norm, total)
    return total


def _total_norm(model: nn.Module, runtime: Runtime, norm_type: float) -> Tensor:
    """The norm of all whole gradients together. A slice that several ranks hold counts once."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    largest = math.isinf(norm_type)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for name, param in model.named_parameters():
        if param.grad is None:
            continue
        for part, holders in _parts(runtime, name, param.grad):
            norm = _norm(part.detach(), norm_type)
            total = torch.maximum(total, norm) if largest else total + norm**norm_type / holders
    group = runtime.compiler.group
    if group is not None:
        dist.all_reduce(total, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)
    return total.float() if largest else (total ** (1.0 / norm_type)).float()


def _norm(part: Tensor, norm_type: float) -> Tensor:
    """The norm of a rank's part; of all that further parallelism (FSDP) has made of it."""
    if not part.numel():
        return torch.zeros((), dtype=torch.float64, device=part.device)
    dtype = torch.promote_types(part.dtype, torch.float32)
    norm = torch.linalg.vector_norm(part, norm_type, dtype=dtype)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).double()


def _parts(runtime: Runtime, name: str, grad: Tensor) -> list[tuple[Tensor, int]]:
    """The segments of a rank's gradient, each with the number of ranks that hold the same.

    Raises:
        TpCompileError: a custom strategy divides the parameter, perhaps so that ranks share some of it.
    """
    layout, rank = runtime.layout, runtime.compiler.rank
    if layout is None or name not in layout.params:
        return [(grad, runtime.compiler.ranks)]
    if layout.params[name].selection is not None:
        raise TpCompileError(
            "a custom strategy divides this parameter in a way of its own: its norm is not known",
            where=name,
            todo="clip the gradients by yourself",
        )
    segments = layout.params[name].segments
    copies = [math.prod(layout.axes[i] for i in copied_along(s, layout.axes)) for s in segments]
    return list(zip(layout.segments_of(name, grad, rank), copies, strict=True))

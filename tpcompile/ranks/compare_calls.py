"""Finds out that ranks were given different weights or different calls, before they compute with them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from .agree import compare

_SAMPLE = 64
_LARGEST_COMPARED = 1 << 22


def compare_weights(group: dist.ProcessGroup | None, tensors: Mapping[str, Tensor]) -> None:
    """Compares a sample of every weight over the ranks, which are about to take slices of their own copies.

    Raises:
        TpCompileError: on all ranks, with the first weight that differs.
    """
    if group is None or dist.get_world_size(group) == 1:
        return
    lines = [
        f"{name}: {tensor.dtype} {list(tensor.shape)} {_sample(tensor)}" for name, tensor in tensors.items()
    ]
    compare(group, "weights", lines, "load the same checkpoint, or set the same seed, on every rank")


def compare_call(
    group: dist.ProcessGroup | None, what: str, names: Sequence[str], leaves: Sequence[Any]
) -> None:
    """Compares the arguments of a call over the ranks: shapes, and contents where equality means something.

    Floating point numbers that every rank has computed for itself may differ in their last digits.

    Args:
        group: the ranks.
        what: is called.
        names: of the leaves.
        leaves: the arguments, flat.

    Raises:
        TpCompileError: on all ranks, with the first argument that differs.
    """
    if group is None or dist.get_world_size(group) == 1:
        return
    lines = [
        what,
        *(f"{name}: {describe_value(leaf, floats=False)}" for name, leaf in zip(names, leaves, strict=True)),
    ]
    compare(group, "calls", lines, "call the model with the same arguments, in the same mode, on every rank")


def can_compare(leaves: Sequence[Any]) -> bool:
    """Whether a call has values that can be sent: not while it is traced, exported or transformed."""
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    recorded = get_proxy_mode() is not None or detect_fake_mode(list(leaves)) is not None
    return not (traced or transformed or recorded)


def describe_value(value: Any, floats: bool = True) -> str:
    """A value as text: tensors by type, shape and contents (those of floating point only if asked for)."""
    if isinstance(value, Tensor):
        facts = f"{value.dtype} {list(value.shape)}"
        exact = floats or not (value.dtype.is_floating_point or value.dtype.is_complex)
        return f"{facts} {_digest(value)}" if exact and _has_contents(value) else facts
    return repr(value) if isinstance(value, (type(None), bool, int, float, str)) else type(value).__name__


def _has_contents(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.numel() <= _LARGEST_COMPARED


def _sample(tensor: Tensor) -> str:
    """A digest of some elements, spread over the tensor; what has no values has none."""
    if tensor.is_meta or not tensor.numel():
        return ""
    if tensor.dtype.itemsize == 1:  # small floats cannot be indexed
        tensor = tensor.detach().view(torch.uint8)
    count = min(_SAMPLE, tensor.numel())
    at = torch.linspace(0, tensor.numel() - 1, count, dtype=torch.float64).long().to(tensor.device)
    return _digest(tensor.detach().take(at))


def _digest(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()[:16]

"""Finds out that ranks were given different weights or different calls, before they compute with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from tpcompile.ir.torch_internals import detect_fake_mode, get_tracing_state, peek_interpreter_stack

from .agree import compare
from .describe import describe_value


def compare_weights(group: dist.ProcessGroup | None, tensors: Mapping[str, Tensor]) -> None:
    """Compares every element of every weight over the ranks, which are about to take slices of their copies.

    Each rank reads its copy once, at more than a gigabyte per second on one core; what travels is one hash.

    Raises:
        TpCompileError: on all ranks, with the first weight that differs.
    """
    if group is None or dist.get_world_size(group) == 1:
        return
    lines = [f"{name}: {describe_value(tensor)}" for name, tensor in tensors.items()]
    compare(group, "weights", lines, "load the same checkpoint, or set the same seed, on every rank")


def compare_call(
    group: dist.ProcessGroup | None, act: str, what: str, names: Sequence[str], leaves: Sequence[Any]
) -> None:
    """Compares the arguments of a call over the ranks: shapes, and contents where equality means something.

    Floating point numbers that every rank has computed for itself may differ in their last digits.

    Args:
        group: the ranks.
        act: what is to be done with the call: "run" it, or "capture" it.
        what: is called.
        names: of the leaves.
        leaves: the arguments, flat.

    Raises:
        TpCompileError: on all ranks, with the first argument that differs.
    """
    if group is None or dist.get_world_size(group) == 1:
        return
    lines = [what]
    lines += [
        f"{name}: {describe_value(leaf, floats=False)}" for name, leaf in zip(names, leaves, strict=True)
    ]
    lines.append(f"{act} the call")
    compare(
        group,
        "calls",
        lines,
        "call the model with the same arguments, in the same mode, on every rank",
    )


def can_compare(leaves: Sequence[Any]) -> bool:
    """Whether a call has values that can be sent: not while it is traced, exported or transformed."""
    traced = torch.compiler.is_compiling() or get_tracing_state() is not None
    transformed = peek_interpreter_stack() is not None
    recorded = get_proxy_mode() is not None or detect_fake_mode(list(leaves)) is not None
    return not (traced or transformed or recorded)

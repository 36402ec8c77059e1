"""Finds out that ranks were given different weights or different calls, before they compute with them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from tpcompile.errors import TpCompileError
from tpcompile.ir.nodes import has_fractions
from tpcompile.ir.torch_internals import detect_fake_mode, get_tracing_state, peek_interpreter_stack

from .agree import compare
from .describe import describe_value
from .exchange import exchange, name_of

MOST_SIZES = 8
"""Of how many sizes of its calls a program's first one is compared by content, too."""

_SAMPLE = 64
_APART = 0.02
"""How far numbers that are the same but for rounding may be apart, as a part of their sizes."""


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
    """Compares the arguments of a call over the ranks: shapes, and contents.

    Floating point numbers that every rank has computed for itself may differ in their last digits. Those of
    calls that are to run must be about the same; in one that is to be captured they are examples, and torch's
    pipelines try their stages on memory as it is.

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
    if act == "run" and not _is_tried_out():
        _compare_numbers(group, {n: x for n, x in zip(names, leaves, strict=True) if _has_numbers(x)})


def compare_sizes(
    group: dist.ProcessGroup | None, what: str, names: Sequence[str], leaves: Sequence[Any]
) -> None:
    """Compares the sizes and numbers of a call over the ranks, in one message that waits for no device.

    Args:
        group: the ranks.
        what: is called.
        names: of the leaves.
        leaves: the arguments, flat.

    Raises:
        TpCompileError: on all ranks, with the first argument that differs.
    """
    named = zip(names, leaves, strict=True)
    lines = [f"{n}: {list(x.shape) if isinstance(x, Tensor) else describe_value(x)}" for n, x in named]
    todo = "call the model with the same arguments on every rank"
    compare(group, "sizes of a call", [what, *lines], todo)


def _compare_numbers(group: dist.ProcessGroup, tensors: Mapping[str, Tensor]) -> None:
    """Finds out that ranks have other batches: samples of the numbers, which differ by more than rounding."""
    if not tensors:
        return
    samples = {name: _sample(tensor) for name, tensor in tensors.items()}
    everyone = exchange(group, "compare numbers in the call", samples)
    for name, first in everyone[0].items():
        for rank, other in enumerate(everyone):
            apart = sum(abs(a - b) for a, b in zip(first, other[name], strict=True))
            if apart > _APART * sum(map(abs, (*first, *other[name]))):
                one, two = (", ".join(f"{x:.4g}" for x in some[:3]) for some in (first, other[name]))
                raise TpCompileError(
                    f"the ranks were given different numbers: {name_of(group, 0)} has '{name}: {one}, ...', "
                    f"{name_of(group, rank)} has '{name}: {two}, ...'",
                    where="the call",
                    todo="give all ranks that share the model the same batch",
                )


def _is_tried_out() -> bool:
    """Whether a pipeline calls its stage: the first time is on memory as it is, for shapes alone."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith("torch.distributed.pipelining"):
            return True
        frame = frame.f_back
    return False


def _has_numbers(leaf: Any) -> bool:
    plain = type(leaf) in (Tensor, torch.nn.Parameter) and leaf.layout is torch.strided
    return plain and has_fractions(leaf) and leaf.numel() > 0


def _sample(tensor: Tensor) -> list[float]:
    tensor = tensor.detach()
    flat = (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).flatten()
    count = min(len(flat), _SAMPLE)
    # Whole numbers: those of floating point, of whatever type is the default, end up behind a large tensor.
    at = [i * (len(flat) - 1) // max(count - 1, 1) for i in range(count)]
    return flat[torch.tensor(at, device=flat.device)].double().tolist()


def can_compare(leaves: Sequence[Any]) -> bool:
    """Whether a call has values that can be sent: not while it is traced, exported or transformed."""
    traced = torch.compiler.is_compiling() or get_tracing_state() is not None
    transformed = peek_interpreter_stack() is not None
    recorded = get_proxy_mode() is not None or detect_fake_mode(list(leaves)) is not None
    return not (traced or transformed or recorded)

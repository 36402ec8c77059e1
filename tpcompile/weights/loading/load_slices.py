"""Loads a rank's slices: every tensor of a sharded model that is still on ``meta`` gets its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from tpcompile.errors import refusing
from tpcompile.ir.module_tensors import replace_tensors, tensors_by_name
from tpcompile.weights.sharded_parameter import ShardedParameter, local_tensor
from tpcompile.weights.sharded_weights import ShardedWeights
from tpcompile.weights.tensor_layout import TensorLayout

from .expressions import Expression, leaves
from .fill_tensor import Filler
from .map_slice import map_slice
from .read_headers import MappedFiles, Stored

_PATIENCE = 1.0  # seconds before a progress bar shows


def load_slices(
    model: nn.Module,
    expressions: Mapping[str, Expression],
    weights: ShardedWeights,
    device: torch.device,
    *,
    show: bool = False,
) -> None:
    """Reads this rank's slices.

    Slices that are in one piece in their file, for a CPU and in the type that is wanted, stay mapped. Beside
    the others it needs memory for one whole parameter at a time, and for that only where a conversion is
    more than joining, cutting and transposing, or where a custom strategy cuts the parameter.

    Args:
        model: a sharded model; its tensors on ``meta`` are read.
        expressions: per name what the whole tensor is made of.
        weights: where the weights are.
        device: where the slices go.
        show: whether to show a progress bar on a terminal, if it takes more than a second.

    Raises:
        TpCompileError: a tensor cannot be read.
    """
    places = tensors_by_name(model)
    waiting = {name: getattr(*place) for name, place in places.items() if getattr(*place).is_meta}
    total = sum(local_tensor(tensor).nbytes for tensor in waiting.values())
    order = sorted(waiting, key=lambda n: _position(expressions[n]))
    files, new = MappedFiles(), {}
    with _bar(total, show) as progress:
        for name in order:
            where = weights.of(name)
            local = _read(waiting[name], where, expressions[name], device, files.read)
            new[id(waiting[name])] = _like(waiting[name], local, where)
            progress.update(local.nbytes)
    replace_tensors(model, new)


def _like(old: Tensor, local: Tensor, where: TensorLayout) -> Tensor:
    """A weight with values, of the kind that it was without."""
    if isinstance(old, nn.Parameter):
        return ShardedParameter.parameter(local, where, old.requires_grad)
    return local if where.whole else ShardedParameter(local, where)


def _bar(total: int, show: bool) -> Any:
    off = None if show else True  # None: off where stderr is not a terminal
    return tqdm(total=total, desc="loading", unit="B", unit_scale=True, delay=_PATIENCE, disable=off)


def _position(expression: Expression) -> tuple[str, int]:
    """Where a tensor begins: files are read from front to back."""
    first = next(leaf for leaf in leaves(expression) if isinstance(leaf, Stored))
    return first.file, first.start


def _read(
    like: Tensor,
    where: TensorLayout,
    expression: Expression,
    device: torch.device,
    read: Callable[[Stored], Tensor],
) -> Tensor:
    """A rank's slice: memory of the file where it is in one piece there and on a CPU, else a copy."""
    name, shape = where.name, where.local_shape
    if where.param.selection is not None:
        return where.cut(_whole(name, expression, read)).to(device, like.dtype)
    ranges = where.layout.ranges(name, where.rank)
    with _reading(name, expression), torch.no_grad():
        if device.type == "cpu" and len(ranges) == 1 and tuple(ranges[0].sizes) == tuple(shape):
            mapped = map_slice(expression, ranges[0].offsets, ranges[0].sizes, like.dtype)
            if mapped is not None:
                return mapped
        local = torch.empty(shape, dtype=like.dtype, device=device)
        filler = Filler(read)  # type: ignore[arg-type]
        for part in ranges:
            filler.fill(local[part.where], expression, part.offsets)
        return local


def _whole(name: str, expression: Expression, read: Callable[[Stored], Tensor]) -> Tensor:
    """All of a parameter."""
    whole = torch.empty(expression.shape, dtype=expression.dtype)
    with _reading(name, expression), torch.no_grad():
        Filler(read).fill(whole, expression, (0,) * whole.ndim)  # type: ignore[arg-type]
    return whole


def _reading(name: str, expression: Expression) -> AbstractContextManager[None]:
    """Where a parameter is read."""
    todo = "see that the checkpoint is complete and not being written"
    return refusing(f"{name} could not be loaded", where=next(leaves(expression)).place, todo=todo)

"""Loads a rank's slices: every tensor of a sharded model that is still on ``meta`` gets its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from tpcompile.errors import TpCompileError
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.module_tensors import replace_tensors, tensors_by_name
from tpcompile.strategies.custom.custom_modules import CustomModules
from tpcompile.weights.shard import cut

from .expressions import Expression, leaves
from .fill_tensor import Filler
from .map_slice import map_slice
from .read_headers import MappedFiles, Stored

_PATIENCE = 1.0  # seconds before a progress bar shows


def load_slices(
    model: nn.Module,
    expressions: Mapping[str, Expression],
    layout: WeightLayout,
    rank: int,
    device: torch.device,
    custom: CustomModules,
    *,
    show: bool = False,
) -> None:
    """Reads this rank's slices.

    Slices that lie in one piece in their file, for a CPU and in the type that is wanted, stay mapped. Beside
    the others it needs memory for one whole parameter at a time, and for that only where a conversion is
    more than joining, cutting and transposing, or where a custom strategy cuts the parameter.

    Args:
        model: a sharded model; its tensors on ``meta`` have the shapes of this rank's slices.
        expressions: per name what the whole tensor is made of.
        layout: where the weights lie.
        rank: this rank, in the layout.
        device: where the slices go.
        custom: cuts what only a custom strategy can.
        show: whether to show a progress bar, if it takes more than a second.

    Raises:
        TpCompileError: a tensor cannot be read.
    """
    places = tensors_by_name(model)
    waiting = {name: getattr(*place) for name, place in places.items() if getattr(*place).is_meta}
    total = sum(tensor.nbytes for tensor in waiting.values())
    order = sorted(waiting, key=lambda n: _position(expressions[n]))
    files, new = MappedFiles(), {}
    with _bar(total, show) as progress:
        for name in order:
            old = waiting[name]
            if layout.params[name].selection is None:
                local = _read(old, name, expressions[name], layout, rank, device, files.read)
            else:
                whole = _whole(name, expressions[name], files.read)
                local = torch.empty(old.shape, dtype=old.dtype, device=device)
                with torch.no_grad():
                    local.copy_(cut(name, whole, layout, rank, custom))
            new[id(old)] = nn.Parameter(local, old.requires_grad) if isinstance(old, nn.Parameter) else local
            progress.update(local.nbytes)
    replace_tensors(model, new)


def _bar(total: int, show: bool) -> Any:
    return tqdm(total=total, desc="loading", unit="B", unit_scale=True, delay=_PATIENCE, disable=not show)


def _position(expression: Expression) -> tuple[str, int]:
    """Where a tensor begins: files are read from front to back."""
    first = next(leaf for leaf in leaves(expression) if isinstance(leaf, Stored))
    return first.file, first.start


def _read(
    like: Tensor,
    name: str,
    expression: Expression,
    layout: WeightLayout,
    rank: int,
    device: torch.device,
    read: Callable[[Stored], Tensor],
) -> Tensor:
    """A rank's slice: memory of the file where it lies there in one piece and on a CPU, else a copy."""
    ranges = layout.ranges(name, rank)
    try:
        if device.type == "cpu" and len(ranges) == 1 and tuple(ranges[0].sizes) == tuple(like.shape):
            mapped = map_slice(expression, ranges[0].offsets, ranges[0].sizes, like.dtype)
            if mapped is not None:
                return mapped
        local = torch.empty(like.shape, dtype=like.dtype, device=device)
        filler = Filler(read)  # type: ignore[arg-type]
        with torch.no_grad():
            for part in ranges:
                filler.fill(local[part.where], expression, part.offsets)
    except (OSError, RuntimeError) as error:
        raise _unreadable(name, expression, error) from error
    return local


def _whole(name: str, expression: Expression, read: Callable[[Stored], Tensor]) -> Tensor:
    """All of a parameter."""
    whole = torch.empty(expression.shape, dtype=expression.dtype)
    try:
        with torch.no_grad():
            Filler(read).fill(whole, expression, (0,) * whole.ndim)  # type: ignore[arg-type]
    except (OSError, RuntimeError) as error:
        raise _unreadable(name, expression, error) from error
    return whole


def _unreadable(name: str, expression: Expression, error: Exception) -> TpCompileError:
    leaf = next(leaves(expression))
    return TpCompileError(
        f"{name} could not be loaded: {error}",
        where=f"{leaf.file}: {leaf.name}" if isinstance(leaf, Stored) else leaf.name,
        todo="see that the checkpoint is complete and not being written",
    )

"""Loads a rank's slices: every tensor of a sharded model that is still on ``meta`` gets its values."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from ..errors import TpCompileError
from ..layout import WeightLayout
from ..shell import replace_tensors, tensors_by_name
from .expressions import Expression, leaves
from .fill_tensor import Filler
from .leaf_boxes import leaf_boxes
from .read_headers import MappedFiles, Stored

_PATIENCE = 1.0  # seconds before a progress bar shows
_AHEAD = 64 << 20  # bytes that the system is asked to read ahead


def load_slices(
    model: nn.Module,
    expressions: Mapping[str, Expression],
    layout: WeightLayout,
    rank: int,
    device: torch.device,
    *,
    show: bool = False,
) -> None:
    """Reads this rank's slices.

    Beside them it needs memory for one converted parameter at a time, and for that only where a conversion
    is more than joining, cutting and transposing.

    Args:
        model: a sharded model; its tensors on ``meta`` have the shapes of this rank's slices.
        expressions: per name what the whole tensor is made of.
        layout: where the weights lie.
        rank: this rank, in the layout.
        device: where the slices go.
        show: whether to show a progress bar, if it takes more than a second.

    Raises:
        TpCompileError: a tensor cannot be read.
    """
    places = tensors_by_name(model)
    waiting = {name: getattr(*place) for name, place in places.items() if getattr(*place).is_meta}
    total = sum(tensor.nbytes for tensor in waiting.values())
    order = sorted(waiting, key=lambda n: _position(expressions[n]))
    files, new = MappedFiles(), {}
    with contextlib.closing(files), _bar(total, show) as progress:
        for name in _announced(order, expressions, layout, rank, files):
            old = waiting[name]
            local = torch.empty(old.shape, dtype=old.dtype, device=device)
            _fill(local, name, expressions[name], layout, rank, files.read)
            new[id(old)] = nn.Parameter(local, old.requires_grad) if isinstance(old, nn.Parameter) else local
            progress.update(local.nbytes)
    replace_tensors(model, new)


def _bar(total: int, show: bool) -> Any:
    return tqdm(total=total, desc="loading", unit="B", unit_scale=True, delay=_PATIENCE, disable=not show)


def _announced(
    order: Sequence[str],
    expressions: Mapping[str, Expression],
    layout: WeightLayout,
    rank: int,
    files: MappedFiles,
) -> Iterator[str]:
    """The names again; what the next ones are made of is announced to the system before they are read."""
    ahead: deque[tuple[str, int]] = deque()
    rest = iter(order)
    while True:
        while sum(size for _, size in ahead) < _AHEAD and (name := next(rest, None)) is not None:
            parts = layout.ranges(name, rank)
            boxes = (box for p in parts for box in leaf_boxes(expressions[name], p.offsets, p.sizes))
            try:
                ahead.append((name, sum(files.expect(*box) for box in boxes)))
            except OSError as error:
                raise _unreadable(name, expressions[name], error) from error
        if not ahead:
            return
        yield ahead.popleft()[0]


def _position(expression: Expression) -> tuple[str, int]:
    """Where a tensor begins: files are read from front to back."""
    first = next(leaf for leaf in leaves(expression) if isinstance(leaf, Stored))
    return first.file, first.start


def _fill(
    local: Tensor,
    name: str,
    expression: Expression,
    layout: WeightLayout,
    rank: int,
    read: Callable[[Stored], Tensor],
) -> None:
    filler = Filler(read)  # type: ignore[arg-type]
    try:
        with torch.no_grad():
            for part in layout.ranges(name, rank):
                filler.fill(local[part.where], expression, part.offsets)
    except (OSError, RuntimeError) as error:
        raise _unreadable(name, expression, error) from error


def _unreadable(name: str, expression: Expression, error: Exception) -> TpCompileError:
    leaf = next(leaves(expression))
    return TpCompileError(
        f"{name} could not be loaded: {error}",
        where=f"{leaf.file}: {leaf.name}" if isinstance(leaf, Stored) else leaf.name,
        todo="see that the checkpoint is complete and not being written",
    )

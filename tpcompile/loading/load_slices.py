"""Loads a rank's slices: every tensor of a sharded model that is still on ``meta`` gets its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers.utils.logging import tqdm

from ..errors import TpCompileError
from ..layout import WeightLayout
from ..shell import replace_tensors, tensors_by_name
from .expressions import Expression, leaves
from .fill_tensor import Filler
from .read_headers import MappedFiles, Stored

_PATIENCE = 1.0  # seconds before a progress bar shows


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
    files, new = MappedFiles(), {}
    with tqdm(
        total=total, desc="loading", unit="B", unit_scale=True, delay=_PATIENCE, disable=not show
    ) as progress:
        for name in sorted(waiting, key=lambda n: _position(expressions[n])):
            old = waiting[name]
            local = torch.empty(old.shape, dtype=old.dtype, device=device)
            _fill(local, name, expressions[name], layout, rank, files.read)
            new[id(old)] = nn.Parameter(local, old.requires_grad) if isinstance(old, nn.Parameter) else local
            progress.update(local.nbytes)
    replace_tensors(model, new)


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
        leaf = next(leaves(expression))
        raise TpCompileError(
            f"{name} could not be loaded: {error}",
            where=f"{leaf.file}: {leaf.name}" if isinstance(leaf, Stored) else leaf.name,
            todo="see that the checkpoint is complete and not being written",
        ) from error

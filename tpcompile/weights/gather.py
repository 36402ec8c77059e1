"""The ordinary state dict of a sharded model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor


def gathered(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The whole tensors of a state dict, tied ones under each of their names. All ranks must call it."""
    gathered: dict[int, Tensor] = {}
    full: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if id(tensor) not in gathered and isinstance(tensor, Tensor):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            gathered[id(tensor)] = whole.detach()
        full[name] = gathered.get(id(tensor), tensor)
    return full

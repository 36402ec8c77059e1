"""The ordinary state dict of a sharded model."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole tensors under the original names, tied ones under each of theirs.

    Non-persistent buffers are left out, as in ``state_dict``. All ranks must call it.
    """
    gathered: dict[int, Tensor] = {}
    full: dict[str, Tensor] = {}
    for name, tensor in nn.Module.state_dict(model, keep_vars=True).items():
        if id(tensor) not in gathered and isinstance(tensor, Tensor):
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            gathered[id(tensor)] = whole.detach()
        full[name] = gathered.get(id(tensor), tensor)
    return full

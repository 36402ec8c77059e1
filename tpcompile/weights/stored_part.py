"""What ``torch.save`` writes of a sharded parameter: a part that knows whose it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpcompile.errors import TpCompileError


@dataclass(frozen=True)
class StoredPart:
    """A part of a weight that was pickled; no tensor, so that nothing takes it for the whole.

    Attributes:
        local: the part.
        rank: whose it is.
        layout: how the whole was laid out.
    """

    local: Tensor
    rank: int
    layout: str

    def __getattr__(self, name: str) -> Any:
        if hasattr(Tensor, name) and not name.startswith("_"):
            raise TpCompileError(
                "a part of a weight that came through pickle is used as a tensor",
                where=f"{name} of what rank {self.rank} has pickled",
                todo="pickle full_tensor(), or model.full_state_dict(), which all ranks must call",
            )
        raise AttributeError(name)


def stored_part(*fields: Any) -> StoredPart:
    """What pickle calls."""
    return StoredPart(*fields)


torch.serialization.add_safe_globals([stored_part])

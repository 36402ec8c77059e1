"""The configurations that a model's code reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def configurations(model: nn.Module) -> Iterator[Any]:
    """The configurations of a model and of its parts, with those inside of them; each once."""
    left = [m.__dict__.get("config") for m in model.modules()]
    seen: set[int] = set()
    while left:
        config = left.pop(0)
        if id(config) in seen or not hasattr(config, "to_dict") or not hasattr(config, "__dict__"):
            continue
        seen.add(id(config))
        yield config
        left.extend(vars(config).values())

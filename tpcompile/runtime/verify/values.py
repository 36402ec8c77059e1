"""The values of a run, by what they are in the graph at global shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Node

from tpcompile.lowering.state import STANDS_FOR

Name = tuple[str, Any]
"""A value of a graph at global shapes: its name there, and which of several equal layers it is in."""


@dataclass
class Trace:
    """The values of one run.

    Attributes:
        keeping: gradients are wanted as well, so that values are kept as they are.
        values: per value what each rank has of it, and as what.
    """

    keeping: bool
    values: dict[Name, dict[int, tuple[Tensor, Any]]] = field(default_factory=dict)

    def __call__(self, rank: int, node: Node, value: Any) -> None:
        """See ``simulate.Watch``."""
        for name, placement in node.meta.get(STANDS_FOR, ()) if isinstance(value, Tensor) else ():
            if self.keeping and value.requires_grad:
                value.retain_grad()
                mine = value
            else:
                mine = value.detach().clone()  # caches are written to later
            self.values.setdefault((name, node.meta.get("block")), {}).setdefault(rank, (mine, placement))

"""What a plan says, as data: reports and comparisons read it, which ``Plan`` offers as methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.proof import Proof
from tpcompile.planner.search.cost import CostModel

from .collective import Collective
from .decide import Pins
from .dry_run.estimate import Estimate
from .global_program import GlobalProgram


@dataclass
class PlanData:
    """What was decided of a model on a mesh axis, and of one program on it; ``Plan`` describes the fields."""

    layout: WeightLayout
    decisions: list[dict[str, Any]]
    fingerprint: str
    collectives: tuple[Collective, ...]
    fallbacks: tuple[str, ...]
    notes: tuple[str, ...]
    cost: CostModel
    seconds: float
    sequence: bool | frozenset[str] = False
    recomputed: tuple[str, ...] = ()
    proof: Proof | None = field(default=None, repr=False, compare=False)
    timings: dict[str, float] = field(default_factory=dict, compare=False)
    planned: GlobalProgram | None = field(default=None, repr=False, compare=False)
    pins: Pins | None = field(default=None, repr=False, compare=False)
    rewritten: GlobalProgram | None = field(default=None, repr=False, compare=False)
    estimator: Callable[..., Estimate] | None = field(default=None, repr=False, compare=False)

    @property
    def ranks(self) -> int:
        """How many ranks share the model."""
        return self.layout.ranks

    @property
    def axis_sizes(self) -> tuple[int, ...]:
        """The sub-axes of the mesh axis, major first."""
        return self.layout.axis_sizes

    @property
    def model_bytes(self) -> int:
        """Bytes of all parameters and buffers."""
        return sum(p.bytes for p in self.layout.params.values())

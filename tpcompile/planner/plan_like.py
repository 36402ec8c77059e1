"""What is read of a plan by those that a plan itself calls."""

from __future__ import annotations

from typing import Protocol

from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.proof import Proof
from tpcompile.planner.search.cost import CostModel

from .collective import Collective
from .decide import Pins
from .global_program import GlobalProgram


class PlanLike(Protocol):
    """A plan as far as reports and comparisons are concerned: ``Plan`` imports them, and not they it."""

    @property
    def layout(self) -> WeightLayout:
        """Where every parameter and buffer is."""

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """What one forward communicates."""

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Operators that are computed whole."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What else the user should know."""

    @property
    def cost(self) -> CostModel:
        """The cost model."""

    @property
    def seconds(self) -> float:
        """The modelled time of one forward of the example."""

    @property
    def proof(self) -> Proof | None:
        """That the placements follow from the rules; None for a plan from disk."""

    @property
    def planned(self) -> GlobalProgram | None:
        """The planned program; None for a plan from disk."""

    @property
    def rewritten(self) -> GlobalProgram | None:
        """The program with its collectives; None for a plan from disk."""

    @property
    def pins(self) -> Pins | None:
        """What its parameters were held to; None for a plan from disk."""

    @property
    def model_bytes(self) -> int:
        """Bytes of all parameters and buffers."""

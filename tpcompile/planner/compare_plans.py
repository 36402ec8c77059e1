"""What one plan costs beside another: modelled time, collectives, bytes."""

from __future__ import annotations

from dataclasses import dataclass

from tpcompile.ir.units import size_text, time_text

from .plan_data import PlanData

# Below this share a difference is not worth a word.
NOTABLE = 0.01


@dataclass(frozen=True)
class Outcome:
    """What a plan costs.

    Attributes:
        seconds: the modelled time of one forward of the example.
        collectives: how many one forward issues.
        moved: bytes of the values that they carry.
        held: bytes of parameters and buffers on the fullest rank.
    """

    seconds: float
    collectives: int
    moved: int
    held: float

    def __str__(self) -> str:
        return (
            f"{self.collectives} collectives of {size_text(self.moved)}, "
            f"{size_text(self.held)} of weights per rank, {time_text(self.seconds)} modelled"
        )


def outcome_of(plan: PlanData) -> Outcome:
    """What a plan costs."""
    held = plan.layout.fullest
    moved = sum(c.count * c.bytes for c in plan.collectives)
    return Outcome(plan.seconds, sum(c.count for c in plan.collectives), moved, held)


def worse(one: Outcome, other: Outcome) -> bool:
    """Whether the first costs notably more than the second, in any respect."""
    pairs = (
        (one.seconds, other.seconds),
        (float(one.collectives), float(other.collectives)),
        (float(one.moved), float(other.moved)),
        (one.held, other.held),
    )
    return any(mine > theirs * (1 + NOTABLE) for mine, theirs in pairs)

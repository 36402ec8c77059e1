"""What was proved of a rewritten program: that its placements follow from its operators' rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .units import time_text


@dataclass(frozen=True)
class Proof:
    """A proof that was found; where there is none, the program is refused.

    Attributes:
        values: how many values have a type on every sub-axis.
        axis_sizes: the sizes of the sub-axes.
        collectives: how many collectives and other changes of placement were checked, by kind.
        rules: how many calls each rule was used for, by operator.
        unruled: the operators without a rule, which take whole values only.
        training: gradients were proved as well.
        version: a fingerprint of the compiler's sources and the user's own rules.
        seconds: what it took, of this rank's time.
    """

    values: int
    axis_sizes: tuple[int, ...]
    collectives: Mapping[str, int]
    rules: Mapping[str, int]
    unruled: tuple[str, ...]
    training: bool
    version: str
    seconds: float = field(compare=False)

    @property
    def head(self) -> str:
        """One line about it."""
        what = "placements and gradients" if self.training else "placements"
        moves = sum(self.collectives.values())
        return (
            f"proved: {what} of {self.values} values, {moves} moves between ranks, "
            f"by {len(self.rules)} rules (version {self.version})"
        )

    def __str__(self) -> str:
        axes = " x ".join(map(str, self.axis_sizes)) or "1"
        lines = [self.head, f"  on {axes} ranks, in {time_text(self.seconds)}"]
        for name, counts in (("moves", self.collectives), ("rules", self.rules)):
            if counts:
                lines.append(f"  {name}: {', '.join(f'{n} x {what}' for what, n in counts.items())}")
        if self.unruled:
            lines.append(f"  without a rule, on whole values only: {', '.join(self.unruled)}")
        return "\n".join(lines)

"""What a verification found, as people read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tpcompile.ir.units import time_text

from .outcome import Finding

Kind = Literal["", "capture", "rewrite", "numerics", "execution", "undecided"]

_KINDS = {
    "": "the same as the unsharded model",
    "numerics": "the same as the unsharded model; what differs is rounding",
    "undecided": "NOT COMPARABLE with the unsharded model, whose own numbers are rounding here",
    "capture": "NOT the unsharded model: capture changed what it computes",
    "execution": "NOT the unsharded model: simulated, it is: look at what runs around its programs",
    "rewrite": "NOT the unsharded model: the plan, a pass, a rule or lowering changed what it computes",
}


@dataclass(frozen=True)
class Difference:
    """The first value that is not what it should be.

    Attributes:
        node: its name in the graph, or the module whose result it is where python has no graph.
        text: the call that computes it, as a graph is printed.
        placement: how the graph says it is placed.
        rule: the rule of its operator.
        module: the module that it was traced in.
        line: the line of the model's source.
        error: how far it is off, relative to the largest value; infinite if it can't be compared.
        backward: it is the value's gradient that differs; the value itself agrees.
        agreed: what it was computed from, all of which agrees; for a gradient, what used the value.
        why: more about it.
    """

    node: str
    text: str
    placement: str
    rule: str
    module: str
    line: str
    error: float
    backward: bool = False
    agreed: tuple[str, ...] = ()
    why: str = ""

    def lines(self) -> Iterator[str]:
        """As text."""
        what = "the gradient of " if self.backward else ""
        yield f"first difference: {what}{self.node}, off by {_error(self.error)}"
        named = ("call", self.text), ("module", self.module), ("line", self.line), ("rule", self.rule)
        for name, text in (*named, ("why", self.why)):
            if text:
                yield f"  {name:8}{text}"
        if self.agreed:
            side = "used by" if self.backward else "from"
            yield f"  {side:8}{', '.join(self.agreed)}, which agree{'s' if len(self.agreed) == 1 else ''}"


@dataclass(frozen=True)
class Report:
    """What a verification found; ``print`` shows it.

    Attributes:
        ranks: how many ranks.
        precision: the type in which values were compared.
        findings: everything that was compared.
        limit: the largest error that rounding explains.
        kind: "" if all is right; "capture": the captured graph is another program than the model's python;
            "rewrite": the sharded program is another one than the captured; "numerics": values differ in the
            model's own type, and agree in float64; "execution": what is simulated is right, what runs is not;
            "undecided": the last bits of its weights change the model's own values by as much as differs.
        first_difference: where it begins, for "capture" and "rewrite".
        seconds: what it took.
        notes: what else is to be known, such as what could not be compared.
    """

    ranks: int
    precision: str
    findings: tuple[Finding, ...]
    limit: float
    kind: Kind
    first_difference: Difference | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the sharded model is the model, up to rounding."""
        return self.kind in ("", "numerics")

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """What is further off than rounding explains."""
        return tuple(f for f in self.findings if not f.error <= self.limit)

    def __str__(self) -> str:
        lines = [f"verified on {self.ranks} ranks in {time_text(self.seconds)}: {_KINDS[self.kind]}"]
        for sort in dict.fromkeys(f.sort for f in self.findings):
            lines.append(f"  {self._line(sort, [f for f in self.findings if f.sort == sort])}")
        lines += self.first_difference.lines() if self.first_difference is not None else []
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _line(self, sort: str, found: Sequence[Finding]) -> str:
        worst = max(found, key=lambda f: f.error)
        count = f"{len(found)} {sort}{'s' if len(found) > 1 else ''}"
        wrong = [f for f in found if f in self.wrong]
        if not wrong:
            return f"{count}: error {_error(worst.error)} at most ({self.precision}, limit {self.limit:.0e})"
        where = f" on {worst.ranks} of {self.ranks} ranks" if worst.ranks else ""
        return f"{count}: {len(wrong)} wrong, {worst.name} by {_error(worst.error)}{where}"


def _error(error: float) -> str:
    return "more than can be said" if error == float("inf") else f"{error:.1e}"

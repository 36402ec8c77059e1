"""Which numbers of ranks a model fits on, as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tpcompile.ir.units import size_text, time_text

from .estimate import Estimate, Mode


@dataclass(frozen=True)
class Size:
    """A number of ranks.

    Attributes:
        ranks: how many.
        fits: whether a step takes no more memory than there is.
        peak: bytes that the fullest rank takes; at least so many where nothing was estimated.
        estimate: what a step takes; None where the weights alone are too many, or the step was refused.
        why: why it does not fit, or was refused; ``""`` where it fits.
    """

    ranks: int
    fits: bool
    peak: float
    estimate: Estimate | None = None
    why: str = ""


@dataclass(frozen=True)
class Fit:
    """Which numbers of ranks a model fits on, and what a step takes there.

    Attributes:
        mode: what a step is.
        memory: bytes that a rank may take.
        device: the name of the device.
        model_bytes: bytes of all weights.
        sizes: the numbers of ranks that were asked for.
        seconds: how long it took to find out.
    """

    mode: Mode
    memory: float
    device: str
    model_bytes: float
    sizes: tuple[Size, ...]
    seconds: float

    @property
    def quickest(self) -> Size | None:
        """The size that takes the least time for a step; None if none fits."""
        return min(self._fitting(), key=lambda size: _seconds(size), default=None)

    @property
    def cheapest(self) -> Size | None:
        """The size that takes the least time of all its devices together for a step; None if none fits."""
        return min(self._fitting(), key=lambda size: size.ranks * _seconds(size), default=None)

    def _fitting(self) -> list[Size]:
        return [size for size in self.sizes if size.fits]

    def to_json(self) -> dict[str, Any]:
        """Plain data, with what follows from it."""
        data = asdict(self)
        for size, plain in zip(self.sizes, data["sizes"], strict=True):
            plain["estimate"] = None if size.estimate is None else size.estimate.to_json()
        best = {"quickest": self.quickest, "cheapest": self.cheapest}
        return data | {name: None if size is None else size.ranks for name, size in best.items()}

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield (
            f"{self.mode} on {self.device}: {size_text(self.model_bytes)} of weights, "
            f"{size_text(self.memory)} on each rank"
        )
        yield ""
        yield f"ranks  fits  peak of a rank  {'step':>11}  {'tokens/s':>10}  of one device"
        for size in self.sizes:
            yield f"{size.ranks:>5}  {'yes' if size.fits else 'no':<4}  " + _row(size)
        yield ""
        for name, best in (("quickest", self.quickest), ("cheapest per token", self.cheapest)):
            yield f"{name}: {'none fits' if best is None else f'{best.ranks} ranks'}"
        found = next((size.estimate for size in self.sizes if size.estimate is not None), None)
        if found is not None:
            yield from (f"rests on: {line}" for line in found.rests_on)


def _row(size: Size) -> str:
    if size.estimate is None:
        return f"{'> ' + size_text(size.peak):>14}  {size.why}"
    seconds = size.estimate.time.seconds
    rate, cost = size.estimate.tokens_per_second, size.estimate.device_seconds_per_token
    row = f"{size_text(size.peak):>14}  {time_text(seconds):>11}"
    if rate is None or cost is None:
        return row
    return f"{row}  {rate:>10,.1f}  {time_text(cost)} per token"


def _seconds(size: Size) -> float:
    assert size.estimate is not None, "what fits was estimated"
    return size.estimate.time.seconds

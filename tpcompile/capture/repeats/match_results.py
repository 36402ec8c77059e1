"""Says how the results of a whole model follow from those of the model with layers left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .blocks import Derived, Repeat
from .cut_run import NotRepeated, Place


class Seen(NamedTuple):
    """A result as it can be compared.

    Attributes:
        name: its key path.
        value: itself, if it is not a tensor.
        absolute: equal for equal results of two runs.
        period: the only period that it is of, if there is one.
        relative: equal for what corresponds in two periods.
    """

    name: str
    value: Any
    absolute: Any
    period: Place | None
    relative: Any


@dataclass(frozen=True)
class Recipe:
    """How the whole model's results follow from the truncated model's.

    Attributes:
        outputs: the truncated model's results that are needed, by their number; those of the layer that
            stands for others which the truncated model does not return come last, as ``~n``: what
            corresponds to result n one period later.
        results: the whole model's results.
        shared: of what every period returns, the positions in ``outputs``, with the period of each.
    """

    outputs: tuple[int, ...]
    results: tuple[Derived, ...]
    shared: dict[int, Place]


def match_results(repeats: Sequence[Repeat], short: Sequence[Seen], full: Sequence[Seen]) -> Recipe:
    """Find for every result of the full run where it comes from in the truncated one.

    Args:
        repeats: the lists of layers.
        short: the results of the truncated run.
        full: those of the full run.

    Raises:
        NotRepeated: for some there is no such place.
    """
    numbers = {(seen.period, seen.relative): n for n, seen in reversed([*enumerate(short)])}
    found = [_inner(repeats, numbers, seen) or _outer(repeats, short, seen) for seen in full]
    every = {
        (d.repeat, seen.relative) for d, seen in zip(found, full, strict=True) if _between(repeats, seen)
    }
    shared = {n: place for (place, form), n in numbers.items() if place and (place.repeat, form) in every}
    shared |= {d.output: Place(d.repeat, repeats[d.repeat].kept - 1) for d in found if d.output < 0}
    # The truncated model's own come first, in their order.
    outputs = sorted({*shared, *(d.output for d in found)}, key=lambda n: (n < 0, abs(n)))
    at = {n: position for position, n in enumerate(outputs)}
    results = tuple(d._replace(output=at[d.output]) for d in found)
    return Recipe(tuple(outputs), results, {at[n]: place for n, place in shared.items()})


def _between(repeats: Sequence[Repeat], seen: Seen) -> bool:
    """Whether a result is of one of the periods that the last kept one stands for, the very last apart."""
    if seen.period is None:
        return False
    repeat = repeats[seen.period.repeat]
    return repeat.kept - 1 <= seen.period.period < repeat.count - 1


def _inner(repeats: Sequence[Repeat], numbers: Mapping[Any, int], seen: Seen) -> Derived | None:
    place = seen.period
    if place is None or not _between(repeats, seen):
        return None
    kept = repeats[place.repeat].kept
    earlier = numbers.get((Place(place.repeat, kept - 2), seen.relative))
    if earlier is None:
        raise NotRepeated(f"the result {seen.name} comes from one of the layers only")
    number = numbers.get((Place(place.repeat, kept - 1), seen.relative), ~earlier)
    return Derived(number, place.repeat, place.period - kept + 1)


def _outer(repeats: Sequence[Repeat], short: Sequence[Seen], seen: Seen) -> Derived:
    """A result of the rest of the model, or of a period that is there in both."""
    candidates = [n for n, other in enumerate(short) if other.absolute == seen.absolute]
    named = [n for n in candidates if short[n].name == seen.name]
    number = isinstance(seen.value, (int, float)) and not isinstance(seen.value, bool)
    if not candidates or (number and not named):
        raise NotRepeated("the results depend on the number of layers")
    place = seen.period
    last = place is not None and place.period == repeats[place.repeat].count - 1
    copies = repeats[place.repeat].copies if place is not None and last else 0
    return Derived((named or candidates)[0], place.repeat if place else -1, copies)

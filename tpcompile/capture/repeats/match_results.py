"""Says how the results of a whole model follow from those of the model with layers left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .cut_run import NotRepeated, Place
from .find_repeats import Repeat
from .trace_results import Form, Results


class Derived(NamedTuple):
    """A result of the whole model: a result of the truncated one, some periods later.

    Attributes:
        output: the truncated model's result, by its position in ``Recipe.outputs``.
        repeat: the list of layers that it comes from, -1 if from none in particular.
        copies: how many periods later.
        name: its key path.
        value: itself, if it is not a tensor.
    """

    output: int
    repeat: int
    copies: int
    name: str
    value: Any = None


@dataclass(frozen=True)
class Recipe:
    """How the whole model's results follow from the truncated model's.

    Attributes:
        outputs: the truncated model's results that are needed, by their number; those of the layer that
            stands for others which the truncated model does not return come last, as ``~n``: what
            corresponds to result n one period later.
        results: the whole model's results.
        own: per result that every period has, its position in ``outputs`` per kept period (-1 for none).
        tails: positions in ``outputs`` that are computed from one period behind the last layer, with it.
    """

    outputs: tuple[int, ...]
    results: tuple[Derived, ...]
    own: tuple[tuple[int, tuple[int, ...]], ...]
    tails: tuple[tuple[int, Place], ...]


def match_results(repeats: Sequence[Repeat], short: Results, full: Results) -> Recipe:
    """Find for every result of the full run where it comes from in the truncated one.

    Raises:
        NotRepeated: for some there is no such place, or what runs behind the last layer differs.
    """
    return _Matcher(repeats, short, full).match()


class _Matcher:
    def __init__(self, repeats: Sequence[Repeat], short: Results, full: Results) -> None:
        self.repeats, self.short, self.full = repeats, short, full
        self.whole: dict[int, list[int]] = {}
        self.part: dict[tuple[Place, int], int] = {}
        for i, form in enumerate(short.forms):
            self.whole.setdefault(form.absolute, []).append(i)
            if form.period is not None:
                self.part.setdefault((form.period, form.relative), i)
        self.own: dict[tuple[int, int], int] = {}

    def match(self) -> Recipe:
        found = [self._inner(i, form) or self._outer(i, form) for i, form in enumerate(self.full.forms)]
        inner = [i for i, form in enumerate(self.full.forms) if self._between(form)]
        numbers = {n for n, *_ in found}
        kept = {n for n in numbers if n >= 0} | self._of_periods()
        added = sorted((n for n in numbers if n < 0), reverse=True)
        idle = [i for i in range(len(self.short.forms)) if i not in kept]
        if self.short.rest(idle) != self.full.rest(inner):
            raise NotRepeated("what runs behind the layers depends on their number")
        return self._recipe(found, (*sorted(kept), *added))

    def _recipe(self, found: list[tuple[int, int, int]], outputs: tuple[int, ...]) -> Recipe:
        at = {n: position for position, n in enumerate(outputs)}
        run = self.full.regions.run
        results = [
            Derived(at[n], repeat, copies, run.names[i], run.values[i])
            for i, (n, repeat, copies) in enumerate(found)
        ]
        own, tails = [], []
        for (repeat, relative), last in self.own.items():
            periods = range(self.repeats[repeat].kept - 1)
            numbers = [self.part.get((Place(repeat, p), relative)) for p in periods]
            own.append(
                (repeat, tuple([*(at.get(n, -1) if n is not None else -1 for n in numbers), at[last]]))
            )
            for period, n in enumerate([*numbers, last]):
                if n is not None and n >= 0 and not self.short.forms[n].direct:
                    tails.append((at[n], Place(repeat, period)))
        return Recipe(outputs, tuple(results), tuple(own), tuple(tails))

    def _of_periods(self) -> set[int]:
        """The truncated model's results that all periods have."""
        return {n for (place, form), n in self.part.items() if (place.repeat, form) in self.own}

    def _between(self, form: Form) -> bool:
        """Whether a result comes from one period that the truncated model's last one stands for."""
        place = form.period
        if place is None or not 0 <= place.repeat < len(self.repeats):
            return False
        repeat = self.repeats[place.repeat]
        return repeat.kept - 1 <= place.period < repeat.count - 1

    def _inner(self, i: int, form: Form) -> tuple[int, int, int] | None:
        """A result of one of the periods that the last kept one stands for, the very last apart."""
        if not self._between(form):
            return None
        place = form.period
        assert place is not None
        kept = self.repeats[place.repeat].kept
        number = self.part.get((Place(place.repeat, kept - 1), form.relative))
        earlier = self.part.get((Place(place.repeat, kept - 2), form.relative))
        if earlier is None or (number is None and not form.direct):
            raise NotRepeated(
                f"the result {self.full.regions.run.names[i]} comes from one of the layers only"
            )
        number = ~earlier if number is None else number
        self.own[place.repeat, form.relative] = number
        return number, place.repeat, place.period - kept + 1

    def _outer(self, i: int, form: Form) -> tuple[int, int, int]:
        """A result of the rest of the model, or of a period that is there in both."""
        run, mine = self.full.regions.run, self.short.regions.run
        candidates = self.whole.get(form.absolute, [])
        named = [n for n in candidates if mine.names[n] == run.names[i]]
        number = isinstance(run.values[i], (int, float)) and not isinstance(run.values[i], bool)
        if not candidates or (number and not named):
            raise NotRepeated("the results depend on the number of layers")
        place = form.period
        if place is None:
            return (named or candidates)[0], -1, 0
        repeat = self.repeats[place.repeat]
        last = place.period == repeat.count - 1
        return (named or candidates)[0], place.repeat, repeat.copies if last else 0

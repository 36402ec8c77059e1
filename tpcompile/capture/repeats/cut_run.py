"""Cuts a recorded run into the periods of repeated layers and the stretches around them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .blocks import Repeat
from .record_run import Mark, RecordedRun


class NotRepeated(Exception):
    """The layers are not copies of each other, or are not called one after the other."""


class Place(NamedTuple):
    """Where an event stands: in which period of which list, or (list -1) in which stretch between lists."""

    repeat: int
    period: int


class CutRun:
    """A run, cut.

    A period ends with its last layer: what the model does between two layers belongs to the later one,
    and what it does after the last layer to none.

    Attributes:
        run: the run.
        spans: the events of every place, in the order of the run.
        places: per event, where it stands and at which position there.
    """

    def __init__(self, repeats: Sequence[Repeat], run: RecordedRun) -> None:
        self.run = run
        self.spans: dict[Place, range] = {}
        cuts = sorted(
            (begin, number, stops)
            for number, repeat in enumerate(repeats)
            for begin, stops in [_periods(number, repeat, run.marks)]
        )
        at = 0
        for stretch, (begin, number, stops) in enumerate(cuts):
            if begin < at:
                raise NotRepeated("two lists of layers run in turns")
            self.spans[Place(-1, stretch)] = range(at, begin)
            for period, stop in enumerate(stops):
                self.spans[Place(number, period)] = range(begin, stop)
                begin = stop
            at = begin
        self.spans[Place(-1, len(cuts))] = range(at, len(run.events))
        self.places = [(place, event - span.start) for place, span in self.spans.items() for event in span]

    def last(self, repeat: int) -> int:
        """The number of the last period of a list."""
        return max(place.period for place in self.spans if place.repeat == repeat)


def _periods(number: int, repeat: Repeat, marks: Sequence[Mark]) -> tuple[int, list[int]]:
    """Return where the first period begins and where each one ends."""
    own = [mark for mark in marks if mark.repeat == number]
    layers = [mark.layer for mark in own[::2]]
    paired = all(
        a.layer == b.layer and a.begins > b.begins for a, b in zip(own[::2], own[1::2], strict=False)
    )
    if len(own) % 2 or not paired or layers != sorted(set(layers)) or repeat.first not in layers:
        raise NotRepeated(f"the layers of {repeat.path} are not called once each, one after the other")
    inside = range(repeat.first, repeat.first + repeat.count * repeat.period)
    ends = [mark.event for mark in own[1::2] if mark.layer in inside]
    if len(ends) % repeat.period:
        raise NotRepeated(f"not every layer of {repeat.path} is called")
    begin = next(mark.event for mark in own if mark.layer == repeat.first)
    return begin, ends[repeat.period - 1 :: repeat.period]


def atoms(token: Any) -> Iterator[Any]:
    """What a token is made of: everything in it that is not a plain tuple."""
    if type(token) is tuple:
        for item in token:
            yield from atoms(item)
    else:
        yield token

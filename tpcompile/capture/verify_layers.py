"""Makes sure, by running the whole model on fake tensors, that the layers left out are copies of one kept.

A layer may depend on its number in ways that no attribute shows (``if self.layer_idx >= 20``), and so may
the loop around the layers, or the shape of the result. So the model runs twice without data, whole and
truncated, and the operators of both runs are compared: what they are, their constants, and whose results
they take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import TreeSpec

from tpcompile.capture.find_repeats import Repeat, truncated
from tpcompile.capture.record_run import Mark, Ref, Run, Weight, first_names, record_run


def refuse_layers(
    model: nn.Module,
    repeats: Sequence[Repeat],
    leaves: Sequence[Any],
    in_spec: TreeSpec,
    device: torch.device,
) -> str | None:
    """Return None if the model is its truncated self with the last kept period repeated, else why not."""
    names = first_names(model)
    with truncated(model, repeats):
        short = record_run(model, repeats, leaves, in_spec, device, names)
    full = record_run(model, repeats, leaves, in_spec, device, names)
    try:
        return _Comparison(repeats, _Regions(repeats, short), _Regions(repeats, full)).refusal()
    except _Disorder as error:
        return str(error)


class _Disorder(Exception):
    """Layers are not called one after the other."""


class _Place(NamedTuple):
    """Where an event stands: in which period of which list, or (list -1) in which stretch between lists."""

    repeat: int
    period: int


_OWN, _BEFORE = _Place(-2, 0), _Place(-2, -1)


class _Operand(NamedTuple):
    """A tensor by the place and position of the event that made it."""

    source: _Place
    position: int
    output: int
    needs_grad: bool


class _Regions:
    """Cuts a run into the periods of every list of layers and the stretches before, between and after.

    A period ends with its last layer: what the model does between two layers belongs to the later one,
    and what it does after the last layer to none.
    """

    def __init__(self, repeats: Sequence[Repeat], run: Run) -> None:
        self.run = run
        self.spans: dict[_Place, range] = {}
        cuts = sorted(
            (begin, number, stops)
            for number, repeat in enumerate(repeats)
            for begin, stops in [_periods(number, repeat, run.marks)]
        )
        at = 0
        for stretch, (begin, number, stops) in enumerate(cuts):
            if begin < at:
                raise _Disorder("two lists of layers run in turns")
            self.spans[_Place(-1, stretch)] = range(at, begin)
            for period, stop in enumerate(stops):
                self.spans[_Place(number, period)] = range(begin, stop)
                begin = stop
            at = begin
        self.spans[_Place(-1, len(cuts))] = range(at, len(run.events))
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
        raise _Disorder(f"the layers of {repeat.path} are not called once each, one after the other")
    inside = range(repeat.first, repeat.first + repeat.count * repeat.period)
    ends = [mark.event for mark in own[1::2] if mark.layer in inside]
    if len(ends) % repeat.period:
        raise _Disorder(f"not every layer of {repeat.path} is called")
    begin = next(mark.event for mark in own if mark.layer == repeat.first)
    return begin, ends[repeat.period - 1 :: repeat.period]


class _Comparison:
    """Compares the full run with the truncated one."""

    def __init__(self, repeats: Sequence[Repeat], short: _Regions, full: _Regions) -> None:
        self.repeats, self.short, self.full = repeats, short, full

    def refusal(self) -> str | None:
        """Why the full run is not the truncated one with periods added; None if it is."""
        for number, repeat in enumerate(self.repeats):
            lasts = (self.short.last(number) + 1, self.full.last(number) + 1)
            if lasts != (repeat.kept, repeat.count):
                return (
                    f"{repeat.path} runs {lasts[1]} of its {repeat.count} periods, {lasts[0]} when truncated"
                )
            refusal = self._refuse_periods(number, repeat)
            if refusal:
                return refusal
        for place, span in self.short.spans.items():
            if self._absolute(self.short, place) != self._absolute(self.full, place):
                where = "outside of the layers" if place.repeat < 0 else self.repeats[place.repeat].path
                return f"what runs {where} depends on the number of layers (after {self._last_op(span)})"
        if self.short.run.structure != self.full.run.structure:
            return "the structure of the result depends on the number of layers"
        results = (self.short.run.results, self.full.run.results)
        if self._token(results[0], self.short, -1) != self._token(results[1], self.full, -1):
            return "the results depend on the number of layers"
        return None

    def _refuse_periods(self, number: int, repeat: Repeat) -> str | None:
        pattern = self._relative(number, repeat.kept - 1)
        if not _same_layout(self._relative(number, repeat.kept - 2), pattern):
            return f"the last two captured periods of {repeat.path} do different things"
        for period in range(repeat.kept, repeat.count):
            if self._relative(number, period) != pattern:
                layer = repeat.first + period * repeat.period
                return f"{repeat.path}.{layer} does not do what the layers before it do"
        return None

    def _last_op(self, span: range) -> str:
        events = self.short.run.events[span.start : span.stop]
        return str(events[-1][0]) if events else "nothing"

    def _absolute(self, regions: _Regions, place: _Place) -> list[Any]:
        span = regions.spans[place]
        return [self._token(e, regions, place.repeat) for e in regions.run.events[span.start : span.stop]]

    def _token(self, token: Any, regions: _Regions, here: int) -> Any:
        """Operands by the place where they were made.

        Seen from elsewhere, the full run's last period of a list is the last kept one, and what stands
        between has no counterpart.
        """
        if isinstance(token, Ref):
            place, position = regions.places[token.event]
            if regions is self.full and place.repeat not in (-1, here):
                repeat = self.repeats[place.repeat]
                if place.period == repeat.count - 1:
                    place = _Place(place.repeat, repeat.kept - 1)
                elif place.period >= repeat.kept - 1:
                    place = _Place(place.repeat, -1)
            return _Operand(place, position, token.output, token.needs_grad)
        if type(token) is tuple:
            return tuple([self._token(item, regions, here) for item in token])
        return token

    def _relative(self, number: int, period: int) -> list[Any]:
        """A period's events; operands from itself and from the period before are named relative to it."""
        regions, repeat = self.full, self.repeats[number]
        span = regions.spans[_Place(number, period)]

        def visit(token: Any) -> Any:
            if isinstance(token, Ref):
                place, position = regions.places[token.event]
                distance = period - place.period if place.repeat == number else -1
                source = {0: _OWN, 1: _BEFORE}.get(distance, place)
                return _Operand(source, position, token.output, token.needs_grad)
            if isinstance(token, Weight):
                own = repeat.period_of(token.name) == period
                return Weight(repeat.shifted(token.name, -period) if own else token.name, token.facts)
            if type(token) is tuple:
                return tuple([visit(item) for item in token])
            return token

        return [visit(event) for event in regions.run.events[span.start : span.stop]]


def _same_layout(earlier: Any, later: Any) -> bool:
    """Whether two periods do the same, whatever the earlier takes where the later takes from the one before.

    The period before the earlier one is the first, which may be built differently.
    """
    if isinstance(later, _Operand) and later.source == _BEFORE:
        return not isinstance(earlier, _Operand) or earlier.source != _OWN
    if type(later) in (list, tuple) and type(earlier) is type(later):
        return len(earlier) == len(later) and all(map(_same_layout, earlier, later))
    return bool(earlier == later)

"""Makes sure, by running the whole model on fake tensors, that the layers left out are copies of one kept.

A layer may depend on its number in ways that no attribute shows (``if self.layer_idx >= 20``), and so may
the loop around the layers, or the shape of the result. So the model runs twice without data, whole and
truncated, and the operators of both runs are compared: what they are, their constants, and whose results
they take. The same runs say which tensors of the call belong to which layer, and which layer every leaf of
the result comes from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from tpcompile.ir.calls import leaf_names
from tpcompile.ir.module_tensors import every_name
from tpcompile.ir.torch_internals import TreeSpec, tree_unflatten

from .assign_leaves import Leaves, assign_leaves, period_of
from .blocks import Repeat
from .cut_run import CutRun, NotRepeated, Place
from .find_repeats import truncated
from .match_results import Recipe, Seen, match_results
from .record_run import Input, RecordedRun, Ref, WeightRef, record_run


@dataclass(frozen=True)
class Evidence:
    """What the runs of the whole and of the truncated model say.

    Attributes:
        leaves: the leaves of the call that belong to single periods.
        twins: per leaf of a layer that is left out: the leaf that stands for it, and how many periods before.
        recipe: how the results of the whole model follow from those of the truncated one.
        whole: the run of the whole model.
        short: the run of the truncated one.
    """

    leaves: Leaves
    twins: dict[int, tuple[int, int]]
    recipe: Recipe
    whole: RecordedRun
    short: RecordedRun


def compare_layers(
    model: nn.Module,
    repeats: Sequence[Repeat],
    leaves: Sequence[Any],
    in_spec: TreeSpec,
    device: torch.device,
) -> Evidence:
    """Compare the model with its truncated self.

    Raises:
        NotRepeated: it is not its truncated self with the last kept period repeated.
    """
    names = {id(tensor): name for name, tensor in reversed(every_name(model))}
    whole = record_run(model, repeats, leaves, in_spec, device, names)
    if whole.left:
        raise NotRepeated(f"forward leaves a tensor in {whole.left[0]}")
    full = CutRun(repeats, whole)
    tensors = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    facts = {i: f"{tuple(leaf.shape)} {leaf.dtype} {leaf.device}" for i, leaf in tensors.items()}
    owned = assign_leaves(full, facts, leaf_names(tree_unflatten(list(leaves), in_spec)))
    twins = owned.twins(repeats)
    given = {leaf: twin for leaf, (twin, _) in twins.items()}
    with truncated(model, repeats):
        run = record_run(model, repeats, leaves, in_spec, device, names, given)
    comparison = _Comparison(repeats, owned, CutRun(repeats, run), full)
    comparison.check()
    recipe = match_results(repeats, comparison.results(comparison.short), comparison.results(full))
    return Evidence(owned, twins, recipe, whole, run)


class _Operand(NamedTuple):
    """A tensor by the place and position of the event that made it."""

    source: Place
    position: int
    output: int
    needs_grad: bool


class _OwnLeaf(NamedTuple):
    """A tensor of the call that belongs to the period that takes it."""

    ordinal: int
    facts: str


_OWN, _BEFORE = Place(-2, 0), Place(-2, -1)


class _Comparison:
    """Compares the full run with the truncated one."""

    def __init__(self, repeats: Sequence[Repeat], leaves: Leaves, short: CutRun, full: CutRun) -> None:
        self.repeats, self.leaves, self.short, self.full = repeats, leaves, short, full

    def check(self) -> None:
        """Find out whether the full run is the truncated one with periods added.

        Raises:
            NotRepeated: it is not.
        """
        for number, repeat in enumerate(self.repeats):
            lasts = (self.short.last(number) + 1, self.full.last(number) + 1)
            if lasts != (repeat.kept, repeat.count):
                raise NotRepeated(
                    f"{repeat.path} runs {lasts[1]} of its {repeat.count} periods, {lasts[0]} when truncated"
                )
            self._check_periods(number, repeat)
        for place, span in self.short.spans.items():
            if self._absolute(self.short, place) != self._absolute(self.full, place):
                where = "outside of the layers" if place.repeat < 0 else self.repeats[place.repeat].path
                raise NotRepeated(
                    f"what runs {where} depends on the number of layers (after {self._last_op(span)})"
                )

    def results(self, cut: CutRun) -> list[Seen]:
        """The results of one of the runs, to be compared with those of the other."""
        run, seen = cut.run, []
        for name, value, token in zip(run.names, run.values, run.results, strict=True):
            place = period_of(token, cut, self.leaves)
            relative = None if place is None else self._seen_from(token, cut, place)
            seen.append(Seen(name, value, self._token(token, cut, -1), place, relative))
        return seen

    def _check_periods(self, number: int, repeat: Repeat) -> None:
        pattern = self._relative(number, repeat.kept - 1)
        if not _same_layout(self._relative(number, repeat.kept - 2), pattern):
            raise NotRepeated(f"the last two captured periods of {repeat.path} do different things")
        for period in range(repeat.kept, repeat.count):
            if self._relative(number, period) != pattern:
                layer = repeat.first + period * repeat.period
                raise NotRepeated(f"{repeat.path}.{layer} does not do what the layers before it do")

    def _last_op(self, span: range) -> str:
        events = self.short.run.events[span.start : span.stop]
        return str(events[-1][0]) if events else "nothing"

    def _absolute(self, cut: CutRun, place: Place) -> list[Any]:
        span = cut.spans[place]
        return [self._token(e, cut, place.repeat) for e in cut.run.events[span.start : span.stop]]

    def _token(self, token: Any, cut: CutRun, here: int) -> Any:
        """Operands by the place where they were made.

        Seen from elsewhere, the full run's last period of a list is the last kept one, and what stands
        between has no counterpart.
        """
        if isinstance(token, Ref):
            place, position = cut.places[token.event]
            if cut is self.full and place.repeat not in (-1, here):
                place = self._counterpart(place)
            return _Operand(place, position, token.output, token.needs_grad)
        if isinstance(token, Input) and token.leaf in self.leaves.owner:
            place = self.leaves.owner[token.leaf]
            if cut is self.full and place.repeat != here:
                place = self._counterpart(place)
            return (place, self._own_leaf(token))
        if type(token) is tuple:
            return tuple([self._token(item, cut, here) for item in token])
        return token

    def _counterpart(self, place: Place) -> Place:
        """The truncated run's period of which the full run's period is the end."""
        repeat = self.repeats[place.repeat]
        if place.period == repeat.count - 1:
            return Place(place.repeat, repeat.kept - 1)
        return Place(place.repeat, -1) if place.period >= repeat.kept - 1 else place

    def _own_leaf(self, token: Input) -> _OwnLeaf:
        return _OwnLeaf(self.leaves.ordinal(token.leaf), token.facts)

    def _relative(self, number: int, period: int) -> list[Any]:
        """A period's events; operands from itself and from the period before are named relative to it."""
        place = Place(number, period)
        span = self.full.spans[place]
        return [
            self._seen_from(event, self.full, place) for event in self.full.run.events[span.start : span.stop]
        ]

    def _seen_from(self, token: Any, cut: CutRun, here: Place) -> Any:
        repeat = self.repeats[here.repeat]
        if isinstance(token, Ref):
            place, position = cut.places[token.event]
            distance = here.period - place.period if place.repeat == here.repeat else -1
            source = {0: _OWN, 1: _BEFORE}.get(distance, place)
            return _Operand(source, position, token.output, token.needs_grad)
        if isinstance(token, WeightRef):
            own = repeat.period_of(token.name) == here.period
            return WeightRef(repeat.shifted(token.name, -here.period) if own else token.name, token.facts)
        if isinstance(token, Input) and self.leaves.owner.get(token.leaf) == here:
            return self._own_leaf(token)
        if type(token) is tuple:
            return tuple([self._seen_from(item, cut, here) for item in token])
        return token


def _same_layout(earlier: Any, later: Any) -> bool:
    """Whether two periods do the same, whatever the earlier takes where the later takes from the one before.

    The period before the earlier one is the first, which may be built differently.
    """
    if isinstance(later, _Operand) and later.source == _BEFORE:
        return not isinstance(earlier, _Operand) or earlier.source != _OWN
    if type(later) in (list, tuple) and type(earlier) is type(later):
        return len(earlier) == len(later) and all(map(_same_layout, earlier, later))
    return bool(earlier == later)

"""Says what every leaf of a result is computed from, so that results of two runs can be compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from .cut_run import Place, Regions, atoms
from .record_run import Input, Ref, Weight


@dataclass(frozen=True)
class Form:
    """How a value comes about.

    Attributes:
        sources: the periods that it is computed from.
        absolute: equal for equal values of two runs.
        relative: equal for what corresponds in two periods; only where there is one source.
        direct: whether it is something of that period, not computed from it later.
        alone: whether nothing else came to it later, neither a weight nor a tensor of the call.
    """

    sources: frozenset[Place]
    absolute: int
    relative: int
    direct: bool = True
    alone: bool = True

    @property
    def period(self) -> Place | None:
        """The only period that it is computed from, if it is one."""
        return next(iter(self.sources)) if len(self.sources) == 1 else None


class Results:
    """The results of a run, and the operators behind the last layer that they come from.

    Args:
        regions: the run.
        owner: leaves of the call that are a period's own.
        absolute: an operand in a form that is the same in another run.
        relative: an operand in a form that is the same in another period, seen from that period.
        known: numbers of the forms that were met; shared by runs that are to be compared.
    """

    def __init__(
        self,
        regions: Regions,
        owner: Mapping[int, Place],
        absolute: Callable[[Any], Any],
        relative: Callable[[Any, Place], Any],
        known: dict[Any, int],
    ) -> None:
        self.regions, self.owner, self.known = regions, owner, known
        self.absolute, self.relative = absolute, relative
        self.span = regions.spans[regions.end]
        self.events: dict[int, Form] = {}
        for event in self.span:
            self.events[event] = self._form(regions.run.events[event])
        self.forms = [self._form(token, direct=True) for token in regions.run.results]

    def rest(self, without: Collection[int]) -> list[int]:
        """The operators behind the last layer, without those that only the given results need, or nothing.

        Names are found by flattening a result once more, which makes the sizes of its caches anew.
        """
        needed = [self.regions.run.results[i] for i in range(len(self.forms)) if i not in without]
        used = {token.event for token in atoms(tuple(needed)) if isinstance(token, Ref)}
        spared = {self.regions.run.results[i] for i in without}
        only = {token.event for token in atoms(tuple(spared)) if isinstance(token, Ref)}
        left = []
        for event in reversed(self.span):
            if event in only and event not in used:
                target = only
            elif event in used or self.regions.run.events[event][0]._schema.is_mutable:
                target = used
                left.append(self.events[event].absolute)
            else:
                continue
            target.update(t.event for t in atoms(self.regions.run.events[event]) if isinstance(t, Ref))
        return left[::-1]

    def _form(self, token: Any, direct: bool = False) -> Form:
        sources: set[Place] = set()
        alone = True
        for atom in atoms(token):
            if isinstance(atom, Ref):
                place = self.regions.places[atom.event][0]
                if atom.event in self.events:
                    sources |= self.events[atom.event].sources
                    alone = alone and self.events[atom.event].alone
                elif place.repeat >= 0:
                    sources.add(place)
            elif isinstance(atom, Input) and atom.leaf in self.owner:
                sources.add(self.owner[atom.leaf])
            elif isinstance(atom, (Input, Weight)):
                alone = False
        own = next(iter(sources)) if len(sources) == 1 else None
        whole = self._number(self._spell(token, None))
        later = isinstance(token, Ref) and token.event in self.events
        return Form(
            frozenset(sources),
            whole,
            whole if own is None else self._number(self._spell(token, own)),
            direct and not later,
            alone,
        )

    def _spell(self, token: Any, own: Place | None) -> Any:
        """A token with operators behind the last layer as numbers, and all else as it is compared."""
        if isinstance(token, Ref) and token.event in self.events:
            form = self.events[token.event]
            relative = own is not None and bool(form.sources)
            return ("result", form.relative if relative else form.absolute, token.output, token.needs_grad)
        if type(token) is tuple:
            return tuple([self._spell(item, own) for item in token])
        return self.absolute(token) if own is None else self.relative(token, own)

    def _number(self, spelled: Any) -> int:
        return self.known.setdefault(spelled, len(self.known))

"""Says which tensors of a call are one layer's own, as the tensors of a cache are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .blocks import Repeat
from .cut_run import CutRun, NotRepeated, Place, atoms
from .record_run import Input, Ref


@dataclass
class Leaves:
    """The leaves of a call that belong to periods of repeated layers.

    Attributes:
        owned: per period, its own leaves, in the order in which it uses them.
        facts: per leaf, its shape and type.
    """

    owned: dict[Place, list[int]] = field(default_factory=dict)
    facts: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.owner = {leaf: place for place, leaves in self.owned.items() for leaf in leaves}

    def ordinal(self, leaf: int) -> int:
        """The position of a leaf among those of its period."""
        return self.owned[self.owner[leaf]].index(leaf)

    def twins(self, repeats: Sequence[Repeat]) -> dict[int, tuple[int, int]]:
        """Per leaf of a layer that is left out: the leaf that stands for it, and how many periods before.

        Raises:
            NotRepeated: layers have different leaves.
        """
        found = {}
        for number, repeat in enumerate(repeats):
            pattern = self.owned.get(Place(number, repeat.kept - 1), [])
            for period in range(repeat.kept, repeat.count):
                mine = self.owned.get(Place(number, period), [])
                if [self.facts.get(i) for i in mine] != [self.facts.get(i) for i in pattern]:
                    layer = repeat.first + period * repeat.period
                    raise NotRepeated(f"{repeat.path}.{layer} takes other inputs than the layers before it")
                copies = period - repeat.kept + 1
                pairs = zip(mine, pattern, strict=True)
                found.update({leaf: (twin, copies) for leaf, twin in pairs if leaf in self.facts})
        return found


def assign_leaves(cut: CutRun, facts: Mapping[int, str], names: Sequence[str]) -> Leaves:
    """Find the leaves that a single period uses; one that no operator uses goes by the result of its name.

    That is a cache's way: what comes in under a name goes out, changed, under the same name.

    Args:
        cut: the run of the whole model.
        facts: shape and type of every tensor among the leaves.
        names: the names of all leaves.
    """
    uses: dict[int, set[Place]] = {}
    for event, (place, _) in zip(cut.run.events, cut.places, strict=True):
        for token in atoms(event):
            if isinstance(token, Input):
                uses.setdefault(token.leaf, set()).add(place)
    owned: dict[Place, list[int]] = {}
    for leaf, places in uses.items():  # in the order of their first use
        place = next(iter(places))
        if len(places) == 1 and place.repeat >= 0:
            owned.setdefault(place, []).append(leaf)
    leaves = Leaves(owned, dict(facts))
    results = zip(cut.run.names, cut.run.results, strict=True)
    made = {name: period_of(token, cut, leaves) for name, token in results}
    for leaf in facts:
        owner = made.get(names[leaf])
        if leaf not in uses and owner is not None:
            owned.setdefault(owner, []).append(leaf)
    return Leaves(owned, dict(facts))


def period_of(token: Any, cut: CutRun, leaves: Leaves) -> Place | None:
    """The only period whose tensors are in a token, if there is one and nothing else is."""
    places = {
        cut.places[atom.event][0] if isinstance(atom, Ref) else leaves.owner.get(atom.leaf)
        for atom in atoms(token)
        if isinstance(atom, (Ref, Input))
    }
    place = places.pop() if len(places) == 1 else None
    return place if place is not None and place.repeat >= 0 else None

"""Says which tensors of a call are one layer's own, as the tensors of a cache are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .cut_run import NotRepeated, Place, Regions, atoms
from .find_repeats import Repeat
from .record_run import Input


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
                found.update({leaf: (twin, copies) for leaf, twin in zip(mine, pattern, strict=True)})
        return found


def assign_leaves(regions: Regions, facts: Mapping[int, str], idle: Mapping[int, Place]) -> Leaves:
    """Find the leaves that a single period uses.

    Args:
        regions: the run of the whole model.
        facts: shape and type of every tensor among the leaves.
        idle: periods of leaves that no operator uses (only their sizes are read).
    """
    uses: dict[int, set[Place]] = {}
    for event, (place, _) in zip(regions.run.events, regions.places, strict=True):
        for token in atoms(event):
            if isinstance(token, Input):
                uses.setdefault(token.leaf, set()).add(place)
    owned: dict[Place, list[int]] = {}
    for leaf, places in uses.items():  # in the order of their first use
        place = next(iter(places))
        if len(places) == 1 and place.repeat >= 0:
            owned.setdefault(place, []).append(leaf)
    for leaf, place in idle.items():
        if leaf not in uses:
            owned.setdefault(place, []).append(leaf)
    return Leaves(owned, dict(facts))

"""Finds lists of layers that repeat, and shortens them for a while."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from .layer_fingerprint import fingerprints, weight_owners

KEPT = 3
"""Periods that stay: two to compare, and before them one that may see other inputs than all others do."""
_FEWEST_DROPPED = 2
_LONGEST_PERIOD = 16


@dataclass(frozen=True)
class Repeat:
    """A list of layers, some of which repeat: ``first`` others, ``count`` periods, and perhaps a rest.

    Attributes:
        path: the name of the ``nn.ModuleList`` or ``nn.Sequential``.
        first: the index of the first layer of the periodic part.
        period: layers per period (2 where two kinds alternate).
        count: periods in the model.
        kept: periods that are captured; the last of them stands for the rest.
    """

    path: str
    first: int
    period: int
    count: int
    kept: int = KEPT

    @property
    def copies(self) -> int:
        """How many periods are left out."""
        return self.count - self.kept

    @property
    def dropped(self) -> range:
        """The indices of the layers that are left out."""
        return range(self.first + self.kept * self.period, self.first + self.count * self.period)

    def layer_of(self, name: str) -> int | None:
        """Return the index of the layer to which a module or parameter belongs, None if to no layer here."""
        prefix = self.path + "." if self.path else ""
        atom = name[len(prefix) :].split(".")[0] if name.startswith(prefix) else ""
        return int(atom) if atom.isdecimal() else None

    def period_of(self, name: str) -> int | None:
        """Return the number of the period to which a module or parameter belongs."""
        index = self.layer_of(name)
        if index is None or not self.first <= index < self.first + self.period * self.count:
            return None
        return (index - self.first) // self.period

    def shifted(self, name: str, periods: int) -> str:
        """Return the name of the same thing some periods later; names outside of the periods stay."""
        if self.period_of(name) is None:
            return name
        start = len(self.path) + 1 if self.path else 0
        moved = re.sub(r"^\d+", lambda m: str(int(m[0]) + periods * self.period), name[start:])
        return name[:start] + moved


def find_repeats(model: nn.Module) -> list[Repeat]:
    """Return the outermost lists of layers of which at least two periods can be left out."""
    owners = weight_owners(model)
    found: list[Repeat] = []
    for path, module in model.named_modules():
        if any(path.startswith(repeat.path + ".") for repeat in found):
            continue
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            layers = list(module)
            plain = list(module._modules) == [str(i) for i in range(len(layers))]
            if not plain or len({id(layer) for layer in layers}) < len(layers):
                continue
            if len(layers) < KEPT + _FEWEST_DROPPED:
                continue
            repeat = _longest(path, fingerprints(layers, owners, path))
            if repeat is not None:
                found.append(repeat)
    return found


def _longest(path: str, facts: Sequence[dict[str, Hashable]]) -> Repeat | None:
    """Return the way to see periods that leaves out the most layers; on a tie the shortest, first one."""
    kinds: list[dict[str, Hashable]] = []
    numbers = []
    for layer in facts:
        if layer not in kinds:
            kinds.append(layer)
        numbers.append(kinds.index(layer))
    best: Repeat | None = None
    for period in range(1, min(_LONGEST_PERIOD, len(facts) // (KEPT + _FEWEST_DROPPED)) + 1):
        first = 0
        while first < len(numbers):
            end = first + period
            while end < len(numbers) and numbers[end] == numbers[end - period]:
                end += 1
            candidate = Repeat(path, first, period, (end - first) // period)
            if candidate.copies >= _FEWEST_DROPPED:
                if best is None or len(candidate.dropped) > len(best.dropped):
                    best = candidate
            first = max(end - period + 1, first + 1)
    return best


@contextmanager
def truncated(model: nn.Module, repeats: Sequence[Repeat]) -> Iterator[None]:
    """Take the repeated layers out of the model inside the block; afterwards it is as it was.

    Layers keep their names, and those before the gap their positions, so that what looks a layer up by
    its number finds the same things. The lists' own tables are swapped, not changed.
    """
    lists = [model.get_submodule(repeat.path) for repeat in repeats]
    before = [module._modules for module in lists]
    try:
        for module, repeat, table in zip(lists, repeats, before, strict=True):
            gone = {str(index) for index in repeat.dropped}
            module.__dict__["_modules"] = {k: v for k, v in table.items() if k not in gone}
        yield
    finally:
        for module, table in zip(lists, before, strict=True):
            module.__dict__["_modules"] = table

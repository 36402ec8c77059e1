"""Which layers of a captured program stand for others that are left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch.fx import Node

from tpcompile.capture.export.specs import InputSpec, OutputSpec

KEPT = 3
"""Periods that stay: two to compare, and before them one that may see other inputs than all others do."""
BLOCK = "block"
"""The key in ``node.meta`` under which a node's ``Block`` is; nodes outside of the periods have none."""


class Block(NamedTuple):
    """A period of repeated layers: the number of the repeat, and of the period in it."""

    repeat: int
    period: int


def block_of(node: Node) -> Block | None:
    """Return the period that a node belongs to."""
    found = node.meta.get(BLOCK)
    return None if found is None else Block(*found)


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


class Derived(NamedTuple):
    """A result of the whole program: a captured one, some periods later.

    Attributes:
        output: the captured result, by its position.
        repeat: the list of layers that it comes from, -1 if from none in particular.
        copies: how many periods later.
    """

    output: int
    repeat: int = -1
    copies: int = 0


@dataclass(frozen=True)
class RepeatedBlocks:
    """Which layers of a captured program stand for others; ``node.meta["block"]`` says where they are.

    Attributes:
        repeats: the lists of layers, numbered as in ``Block.repeat``.
        users: the leaves that a call of the whole program brings.
        outputs: the whole program's results,
        results: and how each of them follows from the captured ones.
        shared: the captured results, by position, that all periods of their list have.
        leaves: the leaves of layers that were left out, by the captured one that stands for them and how
            many periods later they come.
    """

    repeats: tuple[Repeat, ...]
    users: tuple[InputSpec, ...] = ()
    outputs: tuple[OutputSpec, ...] = ()
    results: tuple[Derived, ...] = ()
    shared: frozenset[int] = frozenset()
    leaves: Mapping[tuple[str, int], str] = field(default_factory=dict)

    def renamed(self, repeat: int, name: str, copies: int) -> str:
        """The name of the same weight or leaf some periods later."""
        return self.leaves.get((name, copies)) or self.repeats[repeat].shifted(name, copies)

    def left_out(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """Return (name that was captured, name that was not) for all that was left out.

        Args:
            names: the captured parameters, buffers or modules.
        """
        found = []
        for repeat in self.repeats:
            last = [name for name in names if repeat.period_of(name) == repeat.kept - 1]
            found += [(n, repeat.shifted(n, c)) for c in range(1, repeat.copies + 1) for n in last]
        return found

    def before(self, names: Sequence[str]) -> list[tuple[str, str]]:
        """Return (name of the last captured period, name of the one before it) for all that it has.

        Args:
            names: see ``left_out``.
        """
        return [
            (name, repeat.shifted(name, -1))
            for repeat in self.repeats
            for name in names
            if repeat.period_of(name) == repeat.kept - 1
        ]

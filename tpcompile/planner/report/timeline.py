"""A forward in the order of its program, as the cost model sees it: what a rank reads, computes and sends."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

from torch.fx import Node

from tpcompile.capture.repeats.blocks import block_of
from tpcompile.ir.names import starred
from tpcompile.ir.nodes import module_path
from tpcompile.ir.print_graph import target_text
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.planner.search.cost import CostModel
from tpcompile.planner.search.facts import Facts
from tpcompile.planner.search.itemise import Item, itemise

_LAYER = re.compile(r"(?:[^.]+\.)*?\d+(?=\.|$)")
SHORT = 1e-9
"""Seconds below which an event only breaks ties, and tells no layers apart."""
LANES = {"read": "reads weights", "compute": "computes", "send": "communicates"}


@dataclass(frozen=True)
class Event:
    """Something that takes time.

    Attributes:
        lane: ``read``, ``compute`` or ``send``.
        where: the module, or the weight, with ``*`` for numbers.
        what: the operator, or the collective.
        seconds: how long.
        times: how many of it a forward has.
    """

    lane: str
    where: str
    what: str
    seconds: float
    times: int


@dataclass(frozen=True)
class Stretch:
    """A part of a forward: a layer, all those like it that follow, or what is before, between or after.

    Attributes:
        name: of the layer, with ``*`` for its number; or "".
        events: what one of it does.
    """

    name: str
    events: tuple[Event, ...]

    @property
    def times(self) -> int:
        """How many there are."""
        long = Counter(event.times for event in self.events if event.seconds >= SHORT)
        return long.most_common(1)[0][0] if long else 1

    def seconds(self, lane: str = "") -> float:
        """The time of all of them, in one lane or in all."""
        return sum(e.seconds * e.times for e in self.events if lane in ("", e.lane))


def timeline_of(program: GlobalProgram, cost: CostModel) -> list[Stretch]:
    """The stretches of a planned program; their times add up to what its decisions cost."""
    facts, names = Facts(program, program.planned_factors, cost), program.params()
    layers = {node: _layer(program, node, names) for node in program.graph.nodes}
    found: list[Stretch] = []
    for stretch in _stretches(itemise(facts, program.decisions), names, layers):
        before = found[-1] if found else Stretch("", ())
        if not _long(stretch) and found:
            found[-1] = Stretch(before.name, before.events + stretch.events)
        elif stretch.name and before.name == stretch.name and _once(before) == _once(stretch):
            pairs = zip(_long(before), _long(stretch), strict=True)
            short = [e for e in (*before.events, *stretch.events) if e.seconds < SHORT]
            events = (*(replace(b, times=a.times + b.times) for a, b in pairs), *short)
            found[-1] = Stretch(stretch.name, events)
        else:
            found.append(stretch)
    return found


def layer_of(name: str) -> str:
    """The layer that a module or a weight belongs to: its name up to the first number; "" if it has none."""
    found = _LAYER.match(name)
    return found[0] if found else ""


def _long(stretch: Stretch) -> list[Event]:
    return [event for event in stretch.events if event.seconds >= SHORT]


def _once(stretch: Stretch) -> list[Event]:
    """What a layer does, however often: the same for layers that do the same."""
    return [replace(event, times=1) for event in _long(stretch)]


def _layer(program: GlobalProgram, node: Node, names: Mapping[Node, str]) -> str:
    """The layer of a node: by its name, or because it was captured with one, as sums between layers are."""
    path, block = names.get(node) or module_path(node), block_of(node)
    if layer_of(path) or block is None or program.blocks is None:
        return layer_of(path)
    repeat = program.blocks.repeats[block.repeat]
    if path and not f"{repeat.path}.".startswith(f"{path}."):
        return ""  # of another module, which runs before the layers
    number = repeat.first + (block.period + 1) * repeat.period - 1
    return f"{repeat.path}.{number}" if repeat.path else str(number)


def _stretches(
    items: Iterator[Item], names: Mapping[Node, str], layers: Mapping[Node, str]
) -> Iterator[Stretch]:
    for name, group in groupby(items, key=lambda item: layers[item.node]):
        events = [_event(item, names) for item in group]
        if kept := tuple(event for event in events if event.seconds):
            yield Stretch(starred(name), kept)


def _event(item: Item, names: Mapping[Node, str]) -> Event:
    where = starred(names.get(item.node) or module_path(item.node))
    lane = item.kind if item.kind in LANES else "compute" if item.kind == "rearrange" else "send"
    what = target_text(item.node) if item.kind == "compute" else item.kind
    return Event(lane, where, what, item.seconds, item.times)

"""Bytes per rank, as bars."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.units import ranks_named, size_text

from .markup import Markup, join, tag
from .tree import Module


@dataclass(frozen=True)
class Load:
    """What some ranks hold, each of them, in bytes.

    Attributes:
        ranks: the ranks that hold as much as each other.
        own: of what no other rank has.
        shared: of what some other ranks have too.
        whole: of what every rank has.
    """

    ranks: tuple[int, ...]
    own: float
    shared: float
    whole: float

    @property
    def bytes(self) -> float:
        """All of it."""
        return self.own + self.shared + self.whole


def loads(layout: WeightLayout, tree: Module) -> list[Load]:
    """What ranks hold; those that follow each other and hold equally much are together."""
    weights = [(weight.name, weight.count) for weight in tree.every_weight()]
    every = [_load(layout, weights, rank) for rank in range(layout.ranks)]
    runs = itertools.groupby(range(layout.ranks), key=every.__getitem__)
    return [Load(tuple(ranks), *held) for held, ranks in runs]


def _load(layout: WeightLayout, weights: list[tuple[str, int]], rank: int) -> tuple[float, float, float]:
    own = shared = whole = 0.0
    for name, count in weights:
        for holders, held in _held(layout, name, rank):
            if holders == layout.ranks:
                whole += count * held
            elif holders > 1:
                shared += count * held
            else:
                own += count * held
    return own, shared, whole


def _held(layout: WeightLayout, name: str, rank: int) -> Iterator[tuple[int, int]]:
    """What a rank holds of a parameter, by segments: how many ranks hold the same, and its bytes."""
    param = layout.params[name]
    if param.selection is not None:
        runs = param.selection.runs
        yield 1 if runs is None else runs.count(runs[rank]), layout.local_bytes(name, rank)
        return
    for segment, shape in zip(param.segments, layout.segment_shapes(name, rank), strict=True):
        copies = (n for n, shard in zip(layout.axis_sizes, segment.shards, strict=True) if shard is None)
        yield math.prod(copies), math.prod(shape) * param.dtype.itemsize


def memory_section(layout: WeightLayout, tree: Module) -> Markup:
    """A bar for every rank; ranks that hold the same share one where there are many."""
    found = loads(layout, tree)
    if layout.ranks <= 16:
        found = [Load((rank,), load.own, load.shared, load.whole) for load in found for rank in load.ranks]
    most = max(load.bytes for load in found) or 1
    rows = []
    for load in found:
        kinds = (("own", load.own), ("shared", load.shared), ("whole", load.whole))
        parts = [
            tag(
                "i",
                class_=kind,
                style=f"width:{100 * size / most:.2f}%",
                title=f"{_KINDS[kind]}: {size_text(size)}",
            )
            for kind, size in kinds
            if size
        ]
        rows.append(
            tag(
                "li",
                tag("span", ranks_named(load.ranks), class_="name"),
                tag("span", *parts, class_="bar", aria_hidden="true"),
                tag("span", size_text(load.bytes), class_="number"),
            )
        )
    legend = [join(tag("i", class_=kind), text) for kind, text in _KINDS.items()]
    return tag(
        "section",
        tag("h2", "Memory per rank"),
        tag("p", *(tag("span", each) for each in legend), class_="legend"),
        tag("ul", *rows, class_="bars"),
        id="memory",
    )


_KINDS = {"own": "held by one rank", "shared": "held by some ranks", "whole": "held by every rank"}

"""Prints a plan as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from tpcompile.ir.layout.segment import Segment
from tpcompile.ir.layout.weight_layout import ParamLayout, WeightLayout
from tpcompile.ir.names import starred
from tpcompile.ir.placements import Shard
from tpcompile.ir.units import ranks_named, size_text

from .collective import Collective


def layout_lines(layout: WeightLayout, model_bytes: int) -> list[str]:
    """Memory, and a table of the parameters; equal blocks share a line."""
    held = layout.fullest
    times = held * layout.ranks / max(model_bytes, 1)
    axes = "" if len(layout.axis_sizes) == 1 else f" as {' x '.join(map(str, layout.axis_sizes))}"
    return [
        f"plan for {layout.ranks} ranks{axes}: {size_text(model_bytes)} of parameters and buffers, "
        f"{size_text(held)} on the fullest rank ({times:.3f} x its share)",
        "",
        *_table(("parameter", "x", "shape", "placement", "local shape", "bytes"), _param_rows(layout)),
    ]


def collective_lines(collectives: Sequence[Collective]) -> list[str]:
    """A table of what one forward communicates."""
    rows = [(c.kind, str(c.count), c.where or "(top)", size_text(c.bytes)) for c in collectives]
    return _table(("collective", "x", "where", "bytes each"), rows)


def idle_lines(layout: WeightLayout) -> list[str]:
    """Weights of which some ranks have no part: these wait for the others there."""
    without: dict[tuple[str, ParamLayout], tuple[int, ...]] = {}
    for name, param in layout.params.items():
        alike = starred(name), replace(param, name="")
        if alike not in without and not param.is_whole and 0 not in param.shape:
            shapes = enumerate(layout.local_shape(name, rank) for rank in range(layout.ranks))
            without[alike] = tuple(rank for rank, shape in shapes if 0 in shape)
    found = dict.fromkeys((name, ranks) for (name, _), ranks in without.items() if ranks)
    return [f"no part of {name} on {ranks_named(ranks)} of {layout.ranks}" for name, ranks in found]


def _param_rows(layout: WeightLayout) -> list[tuple[str, ...]]:
    counts: dict[tuple[str, ...], int] = {}
    for name, param in layout.params.items():
        local = layout.local_shape(name, 0)
        placed, text = placement_text(param), size_text(layout.local_bytes(name, 0))
        key = (starred(name), _shape(param.shape), placed, _shape(local), text)
        counts[key] = counts.get(key, 0) + 1
    return [(key[0], str(n), *key[1:]) for key, n in counts.items()]


def placement_text(param: ParamLayout) -> str:
    """``S(0)``, ``R``, ``[S(0) | R | R]`` for segments, ``S(0) x R`` for sub-axes; or a strategy's name."""
    if param.selection is not None:
        return param.selection.strategy
    texts = [_segment_text(s) for s in param.segments]
    return texts[0] if len(texts) == 1 else "[" + " | ".join(texts) + "]"


def _segment_text(segment: Segment) -> str:
    places = map(segment.place, range(len(segment.shards)))
    return " x ".join("R" if place is None else str(Shard(*place)) for place in places) or "R"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    table = [head, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]


def _shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"

"""Prints a plan as a table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tpcompile.ir.layout.weight_layout import ParamLayout, Segment
from tpcompile.ir.names import starred

if TYPE_CHECKING:
    from .plan import Plan


def plan_text(plan: Plan) -> str:
    """Parameters, collectives, modelled time and memory; equal blocks share a line."""
    held = max(plan.layout.held(r) for r in range(plan.ranks))
    times = held * plan.ranks / max(plan.model_bytes, 1)
    axes = "" if len(plan.axes) == 1 else f" as {' x '.join(map(str, plan.axes))}"
    lines = [
        f"plan for {plan.ranks} ranks{axes}: {size_text(plan.model_bytes)} of parameters and buffers, "
        f"{size_text(held)} on the fullest rank ({times:.3f} x its share)",
        "",
        *_table(("parameter", "x", "shape", "placement", "local shape", "bytes"), _param_rows(plan)),
        "",
        *_table(("collective", "x", "where", "bytes each"), _collective_rows(plan)),
        "",
        f"modelled time of the example: {time_text(plan.seconds)} ({plan.cost.name})",
    ]
    lines += [f"fallback: {line}" for line in plan.fallbacks]
    lines += [f"note: {line}" for line in plan.notes]
    return "\n".join(lines)


def _param_rows(plan: Plan) -> list[tuple[str, ...]]:
    counts: dict[tuple[str, ...], int] = {}
    for name, param in plan.layout.params.items():
        local = plan.layout.local_shape(name, 0)
        size = math.prod(local) * param.dtype.itemsize
        key = (
            starred(name),
            _shape(param.shape),
            placement_text(param),
            _shape(local),
            size_text(size),
        )
        counts[key] = counts.get(key, 0) + 1
    return [(key[0], str(n), *key[1:]) for key, n in counts.items()]


def placement_text(param: ParamLayout) -> str:
    """``S(0)``, ``R``, ``[S(0) | R | R]`` for segments, ``S(0) x R`` for sub-axes; or a strategy's name."""
    if param.selection is not None:
        return param.selection.strategy
    texts = [_segment_text(s) for s in param.segments]
    return texts[0] if len(texts) == 1 else "[" + " | ".join(texts) + "]"


def _segment_text(segment: Segment) -> str:
    return " x ".join(_shard_text(segment, s) for s in segment.shards) or "R"


def _shard_text(segment: Segment, shard: int | None) -> str:
    if shard is None:
        return "R"
    for dim, atoms in enumerate(segment.atoms):
        if shard < len(atoms):
            return f"S({dim})" if shard == 0 else f"S({dim}/{shard})"
        shard -= len(atoms)
    raise AssertionError("a shard names no factor")


def _collective_rows(plan: Plan) -> list[tuple[str, ...]]:
    return [(c.kind, str(c.count), c.where or "(top)", size_text(c.bytes)) for c in plan.collectives]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    table = [head, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]


def _shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def size_text(size: float) -> str:
    """Bytes in a readable unit."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def time_text(seconds: float) -> str:
    """Seconds in a readable unit."""
    return f"{seconds * 1e3:.3f} ms" if seconds < 1 else f"{seconds:.3f} s"

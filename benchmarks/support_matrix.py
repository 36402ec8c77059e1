"""Measures what works for every family of tiny models, on real processes, and writes docs/support.md.

    python -m benchmarks.support_matrix [family ...] [--ranks 2 4] [--compiled]

Each row is measured: a failure is a row too, with the first line of its error. Rows that are not asked for
stay as they are, if they were measured with the same versions of torch, transformers and tpcompile.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch.utils.flop_counter import FlopCounterMode

import tpcompile
from tests.helpers import families
from tests.helpers.run_ranks import SpmdError, run_spmd
from tests.on_ranks.models import CAPTURED, OTHER, call, error, mesh

PAGE = Path(__file__).resolve().parent.parent / "docs" / "support.md"
TIMEOUT = 600
F32 = 1e-5
NOT_RUN = "not run"
COLUMNS = (
    "family",
    "ranks",
    "right",
    "bytes of the fullest rank, x ranks",
    "FLOPs of the fullest rank, x ranks",
    "collectives",
    "fallbacks",
    "compiled",
)


@dataclass
class Found:
    """What one rank saw of one family.

    Attributes:
        error: of a forward, at the captured and at other sizes, relative to the largest value.
        held: bytes of the fullest rank's parameters and buffers, times ranks, over the model's.
        flops: this rank's arithmetic, times ranks, over the unsharded model's.
        collectives: how many of each kind a forward issues.
        fallbacks: operators that are computed whole for want of a rule.
        compiled: the error under torch.compile(fullgraph=True), or the first line of its failure, or "".
    """

    error: float
    held: float
    flops: float
    collectives: dict[str, int] = field(default_factory=dict)
    fallbacks: int = 0
    compiled: float | str = ""


def measure(name: str, compiled: bool) -> Found:
    """Measures a family; runs on every rank."""
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a layer, which no FLOP counter knows
    model = families.build(name)
    whole = copy.deepcopy(model)
    sharded = tpcompile.parallelize(model, mesh(), example_kwargs=call(name, CAPTURED))
    plan = sharded.plan
    worst, flops = 0.0, 0.0
    with torch.no_grad():
        for sizes in (CAPTURED, OTHER):
            inputs = call(name, sizes)
            with FlopCounterMode(display=False) as mine:
                result = sharded(**inputs)
            with FlopCounterMode(display=False) as every:
                expected = whole(**inputs)
            # `max` would drop a NaN, which compares as smaller.
            found = error(result, expected)
            worst = found if math.isnan(found) else max(worst, found)
            flops = flops or mine.get_total_flops() * plan.ranks / every.get_total_flops()
    kinds: dict[str, int] = {}
    for collective in plan.collectives:
        kinds[collective.kind] = kinds.get(collective.kind, 0) + collective.count
    held = plan.layout.fullest * plan.ranks / plan.model_bytes
    seen = Found(worst, held, flops, kinds, len(plan.fallbacks))
    if compiled:
        seen.compiled = compile_whole(sharded, whole, name)
    return seen


def compile_whole(sharded: Any, whole: Any, name: str) -> float | str:
    """The error of a compiled forward without graph breaks, or why there is none."""
    inputs = call(name, CAPTURED)
    failure = ""
    try:
        with torch.no_grad():
            result = torch.compile(sharded, fullgraph=True, backend="aot_eager")(**inputs)
    except Exception as refusal:  # a row of the table, whatever it is
        failure = first_line(refusal)
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    if any(failures):
        return str(next(f for f in failures if f))
    with torch.no_grad():
        return error(result, whole(**inputs))


def first_line(failure: BaseException | str) -> str:
    """The first line of an error, fit for a table."""
    kind = "" if isinstance(failure, str) else f"{type(failure).__name__}: "
    lines = str(failure).strip().splitlines() or ["no message"]
    return (kind + lines[0]).replace("|", "\\|")[:160]


def row(name: str, ranks: int, compiled: bool) -> str:
    """A line of the table, measured now."""
    try:
        seen = run_spmd(measure, ranks, name, compiled, timeout=TIMEOUT)
    except SpmdError as failure:
        reason = failure.__cause__ if failure.__cause__ is not None else last_line(str(failure))
        return line([name, str(ranks), f"**failed**: {first_line(reason)}", *["-"] * (len(COLUMNS) - 3)])
    # The worst of each number; the counts are the same on all ranks.
    worst = {f.name: [getattr(s, f.name) for s in seen] for f in fields(Found)}
    kinds = seen[0].collectives
    total = f"{sum(kinds.values())} ({', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))})"
    return line(
        [
            name,
            str(ranks),
            verdict(worst["error"]),
            f"{max(worst['held']):.3f}",
            f"{max(worst['flops']):.3f}",
            total if kinds else "0",
            str(seen[0].fallbacks),
            verdict(worst["compiled"]) if compiled else NOT_RUN,
        ]
    )


def last_line(text: str) -> str:
    """The last line of a traceback: the error itself."""
    lines = [each for each in text.strip().splitlines() if each.strip()]
    return lines[-1] if lines else "no message"


def verdict(errors: list[float | str]) -> str:
    """Yes with the largest error, or no with it, or the failure."""
    failures = [e for e in errors if isinstance(e, str)]
    if failures:
        return f"**failed**: {failures[0]}"
    right = all(e <= F32 for e in errors)  # not of a NaN
    return f"{'yes' if right else '**no**'}, {max(errors):.1e}"


def line(cells: list[str]) -> str:
    """A row of a markdown table."""
    return f"| {' | '.join(cells)} |"


def versions() -> str:
    """What a page was measured with."""
    return ", ".join(f"{each.__name__} {each.__version__}" for each in (torch, transformers, tpcompile))


def rows_text(rows: dict[tuple[str, int], str]) -> str:
    """The rows of a table, families in their own order."""
    order = {name: i for i, name in enumerate(families.FAMILIES)}
    return "".join(rows[key] + "\n" for key in sorted(rows, key=lambda key: (order[key[0]], key[1])))


def heading() -> str:
    """What stands above the table; rows below another one are of other versions."""
    return f"""# What works

Every row was measured by `python -m benchmarks.support_matrix` with {versions()}: tiny two-layer models
(`tests/helpers/families.py`) on gloo processes of one machine, float32, eager, without a cache.

- right: the largest difference from the unsharded model over its largest value, at the captured sizes
  (batch {CAPTURED[0]}, sequence {CAPTURED[1]}) and at others ({OTHER[0]}, {OTHER[1]}); yes up to {F32:g}.
- bytes, FLOPs: of the fullest rank, times ranks, over the unsharded model's; 1 is perfectly divided. Tiny
  models have tables, norms and single heads that are a larger share than in a real one.
- collectives: issued by one forward, by kind. fallbacks: operators computed whole for want of a rule.
- compiled: `torch.compile(fullgraph=True, backend="aot_eager")`, with the error of its result.

{line(list(COLUMNS))}
{line(["---"] * len(COLUMNS))}
"""


def measured(text: str) -> dict[tuple[str, int], str]:
    """The rows of a page, if it has the present heading."""
    if not text.startswith(heading()):
        return {}
    found = {}
    for each in text.removeprefix(heading()).partition("\n## ")[0].splitlines():
        name, ranks = (cell.strip() for cell in each.split("|")[1:3])
        found[name, int(ranks)] = each
    return found


def write(rows: dict[tuple[str, int], str]) -> None:
    """Writes the page."""
    PAGE.parent.mkdir(exist_ok=True)
    _, section, below = (PAGE.read_text() if PAGE.exists() else "").partition("\n## ")  # see verified_matrix
    PAGE.write_text(heading() + rows_text(rows) + section + below)


def main() -> None:
    """Parses the command line, measures row by row, and keeps the page up to date all the while."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="family", help="default: all")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--compiled", action="store_true", help="also under torch.compile")
    options = parser.parse_args()
    unknown = set(options.names) - families.FAMILIES.keys()
    if unknown:
        parser.error(f"unknown families: {', '.join(sorted(unknown))}")
    rows = measured(PAGE.read_text()) if PAGE.exists() else {}
    rows = {key: text for key, text in rows.items() if key[0] in families.FAMILIES}
    for ranks in options.ranks:
        for name in options.names or families.FAMILIES:
            start = time.perf_counter()
            rows[name, ranks] = row(name, ranks, options.compiled)
            print(f"{time.perf_counter() - start:5.0f} s  {rows[name, ranks]}", flush=True)
            write(rows)


if __name__ == "__main__":
    main()

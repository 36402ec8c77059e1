"""Turns what ``benchmarks.faults`` found into text: a line per kind, and the tables of docs/verify.md."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Outcome = dict[str, Any]
"""What became of one fault: its model, kind and outcome."""

OUTCOMES = ("proof", "lowering", "ranks", "verify", "equal", "missed")
_PLACES = {
    "graph": "rewritten graph",
    "one rank": "one rank's program",
    "every rank": "every rank's program",
    "ranks": "programs of other ranks",
    "slices": "slices of weights",
    "rule": "rules",
    "capture": "capture",
    "layers": "layers left out",
}


def read(paths: Iterable[str]) -> Iterator[Outcome]:
    """What files of ``--out`` hold."""
    for path in paths:
        for text in Path(path).read_text().splitlines():
            yield json.loads(text)


def table_of(found: Iterable[Outcome]) -> str:
    """A line per kind of fault, for a terminal."""
    counts = _counts(found, lambda o: o["kind"])
    width = max(map(len, [*counts, "fault"]))
    lines = [f"{'fault':{width}}  mutants  " + "  ".join(f"{outcome:>8}" for outcome in OUTCOMES)]
    for kind, row in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        lines.append(f"{kind:{width}}  {row.total():7}  " + "  ".join(f"{row[o]:8}" for o in OUTCOMES))
    return "\n".join(lines)


def _counts(found: Iterable[Outcome], of: Callable[[Outcome], str]) -> dict[str, Counter[str]]:
    counts: dict[str, Counter[str]] = {}
    for outcome in found:
        counts.setdefault(of(outcome), Counter())[outcome["outcome"]] += 1
    return counts


def _place(outcome: Outcome) -> str:
    return str(outcome["kind"].partition(":")[0])


def report(paths: Iterable[str]) -> str:
    """Three tables: by where the fault was put, by model, and by kind."""
    found = sorted(read(paths), key=lambda o: list(_PLACES).index(_place(o)))
    kinds = {o["kind"]: _place(o) for o in found}
    of_place = Counter(kinds.values())
    total = _counts(found, lambda _: "all")
    places = {f"{_PLACES[p]}, {of_place[p]} kinds": row for p, row in _counts(found, _place).items()}
    return "\n\n".join(
        [
            f"{len(found)} faults of {len(kinds)} kinds, {total['all']['missed']} missed.",
            _markdown("where", places | total),
            _markdown("model", dict(sorted(_counts(found, lambda o: o["model"]).items()))),
            _markdown("kind", _counts(found, lambda o: o["kind"])),
        ]
    )


def _markdown(first: str, rows: dict[str, Counter[str]]) -> str:
    lines = [
        f"| {first} | faults | proof | lowering | ranks compare | verify | changes nothing | missed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [str(row[o] or "") for o in OUTCOMES[:-1]]
        lines.append(f"| {name} | {row.total()} | {' | '.join(cells)} | {row['missed']} |")
    return "\n".join(lines)

"""Turns what ``benchmarks.zoo`` found into text: a line per type, and the lists of docs/models.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def line(found: dict[str, Any]) -> str:
    """One type as text."""
    kind = f"{found['kind']:30} {found['seconds']:5.1f} s"
    if "failed" in found:
        return f"{kind}  {found['stage']}: {found['failed'].splitlines()[0][:160]}"
    fallbacks = "; ".join(f.split(":")[0] for f in found["fallbacks"])
    whole = ", ".join(f"{name} {share:.2f}" for name, share in found["whole"].items())
    return (
        f"{kind}  {_errors(found)}  weights {found['share']:.3f}  "
        f"{found['collectives']:3} collectives"
        + (f"  fallbacks {fallbacks}" if fallbacks else "")
        + (f"  whole {whole}" if whole else "")
    )


def _errors(found: dict[str, Any]) -> str:
    """The largest error of every sort of value, and who is to blame if one is too large."""
    errors = ", ".join(f"{sort} {error:.0e}" for sort, error in found["errors"].items())
    return errors if found["ok"] else f"WRONG ({found['kind of fault']}, {found['first']}) {errors}"


def sort_out(found: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results by what became of them; of several for one type the last counts."""
    last = {(f["auto"], f["kind"]): f for f in found}
    groups: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("divided", "partly", "wrong", "refused", "failed", "not built")
    }
    for f in last.values():
        groups[_group(f)].append(f)
    return groups


def _group(found: dict[str, Any]) -> str:
    if "failed" in found:
        if found["stage"] in ("build", "default"):
            return "not built"
        return "refused" if found.get("refused") else "failed"
    if not found["ok"]:
        return "wrong"
    return "divided" if found["share"] * found.get("ranks", 2) <= 1.2 and not found["fallbacks"] else "partly"


def report(found: Iterable[dict[str, Any]], types: Mapping[str, list[str]]) -> str:
    """A table with a row per auto class, why what is not right and divided is not, and what is left.

    Args:
        found: what the sweep found; of several results for one type the last counts.
        types: those of every auto class.
    """
    found = list(found)
    lines = [
        "| auto class | types | swept | right and divided | right, partly whole | wrong "
        "| refused | failed | not built |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for auto in dict.fromkeys(f["auto"] for f in found):
        groups = sort_out(f for f in found if f["auto"] == auto)
        counts = [len(g) for g in groups.values()]
        lines.append(
            f"| {auto} | {len(types[auto])} | {sum(counts)} | " + " | ".join(map(str, counts)) + " |"
        )
    groups = sort_out(found)
    for name in ("wrong", "failed", "partly", "refused", "not built"):
        if groups[name]:
            lines += ["", f"{name}:"]
            lines += [f"- {f['auto']} {line(f)}" for f in groups[name]]
    return "\n".join([*lines, "", *_left(found, types)])


def _left(found: Iterable[dict[str, Any]], types: Mapping[str, list[str]]) -> list[str]:
    """What was not swept, and which types no auto class has seen."""
    swept = {(f["auto"], f["kind"]) for f in found}
    seen = {kind for _, kind in swept}
    every = {kind for kinds in types.values() for kind in kinds}
    lines = [f"types: {len(every)}, {len(seen & every)} of them swept by at least one class", "", "left:"]
    for auto, kinds in types.items():
        left = [kind for kind in kinds if (auto, kind) not in swept]
        new = [kind for kind in left if kind not in seen]
        seen |= {*new}  # each is named once
        if left:
            unseen = f", {len(new)} of them by no class: {', '.join(new)}" if new else ""
            lines.append(f"- {auto}: {len(left)} of {len(kinds)} types{unseen}")
    return lines

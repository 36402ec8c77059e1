"""The sizes that a program runs on, as one python expression: quick, and traced by dynamo into its guards."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from .captured import Captured

Check = Callable[[Sequence[Any]], bool]


def size_check(captured: Captured) -> Check:
    """A function of a call's leaves that says what ``captured.accepts`` says.

    Only sizes are looked at: that the right leaves are tensors, of the right rank, must be known before.
    """
    known: set[str] = set()
    terms: list[str] = []
    later: list[str] = []
    for i, spec in enumerate(captured.user_inputs):
        for dim, extent in enumerate(spec.extents or ()):
            size = f"leaves[{i}].shape[{dim}]"
            if isinstance(extent, int) or extent in known:
                terms.append(f"{size} == {extent}")
            elif extent in captured.ranges:
                known.add(extent)
                terms += _bounded(f"({extent} := {size})", extent, captured.ranges[extent])
            else:
                later.append(f"{size} == {extent}")
    later += [f"({guard})" for guard in captured.guards]
    text = f"lambda leaves: {' and '.join([*terms, *later]) or 'True'}"
    # Printed by torch for python, from the program's own symbols: nothing of the user's.
    check: Check = eval(text, {"math": math, "__name__": __name__})
    return check if _is_closed(check) else lambda leaves: False


def _bounded(size: str, name: str, bounds: tuple[int, int | None]) -> list[str]:
    low, high = bounds
    # A tensor has no negative size; the first term must name the size all the same.
    return [f"{size} >= {low}"] + ([f"{name} <= {high}"] if high is not None else [])


def _is_closed(check: Check) -> bool:
    """Whether all symbols have a size that they follow from; a program without that runs on nothing."""
    return not any(re.fullmatch(r"[a-z]\d+", name) for name in check.__code__.co_names)

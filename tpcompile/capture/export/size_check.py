"""The sizes that a program runs on, as one python expression: quick, and traced by dynamo into its guards.

Beside them, that elements are in memory in order, if the model's python has asked about that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from .captured import Captured
from .specs import Extent

Check = Callable[[Sequence[Any]], bool]


def size_check(captured: Captured) -> Check:
    """A function of a call's leaves that says what ``captured.accepts`` says.

    Types are not looked at: that the right leaves are tensors, of the right rank, must be known before.
    """
    known: set[str] = set()
    terms: list[str] = []
    later: list[tuple[int, int, Extent]] = []
    seen: set[int] = set()

    def size(leaf: int, dim: int) -> str:
        """A size as code: a tensor is asked for its shape once."""
        if leaf in seen:
            return f"shape{leaf}[{dim}]"
        seen.add(leaf)
        return f"(shape{leaf} := leaves[{leaf}].shape)[{dim}]"

    for i, spec in enumerate(captured.user_inputs):
        for dim, extent in enumerate(spec.extents or ()):
            if isinstance(extent, int) or extent in known:
                terms.append(f"{size(i, dim)} == {extent}")
            elif extent in captured.ranges:
                known.add(extent)
                terms += _bounded(f"({extent} := {size(i, dim)})", extent, captured.ranges[extent])
            else:
                later.append((i, dim, extent))
    terms += [f"{size(i, dim)} == {extent}" for i, dim, extent in later]
    terms += [f"({guard})" for guard in captured.guards]
    if captured.asks_strides:
        tensors = (i for i, spec in enumerate(captured.user_inputs) if spec.extents is not None)
        terms += [f"leaves[{i}].is_contiguous()" for i in tensors]
    text = f"lambda leaves: {' and '.join(terms) or 'True'}"
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

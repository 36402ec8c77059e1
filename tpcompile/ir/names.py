"""Names of parameters and modules."""

from __future__ import annotations

from collections.abc import Sequence


def starred(name: str) -> str:
    """A name with ``*`` for its numbers: ``layers.*.mlp`` for ``layers.3.mlp``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def first_few(names: Sequence[str], between: str = ", ") -> str:
    """The first three of some names, and how many more there are."""
    return between.join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

"""Names of parameters and modules."""

from __future__ import annotations


def starred(name: str) -> str:
    """A name with ``*`` for its numbers: ``layers.*.mlp`` for ``layers.3.mlp``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))

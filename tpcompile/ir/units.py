"""Sizes, times and ranks as people read them."""

from __future__ import annotations

import math
import re

from tpcompile.errors import TpCompileError

UNITS = {"b": 1.0, **{f"{p}b": 1e3**n for n, p in enumerate("kmgt", 1)}}
UNITS |= {f"{p}ib": 1024.0**n for n, p in enumerate("kmgt", 1)}


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


def read_bytes(size: str | float, where: str) -> float:
    """Bytes: a number, or text such as ``80GiB``.

    Raises:
        TpCompileError: it is not a size, or not a positive one.
    """
    found: float = 0.0
    if isinstance(size, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]+)\s*", size)
        if match is not None and match[1].count(".") < 2 and match[1] != "." and match[2].lower() in UNITS:
            found = float(match[1]) * UNITS[match[2].lower()]
    else:
        found = float(size)
    if not 0 < found < math.inf:
        todo = "give a positive number of bytes, or text such as 80GiB"
        raise TpCompileError(f"{str(size)[:40]!r} is not a size of memory", where=where, todo=todo)
    return found


def ranks_named(ranks: tuple[int, ...]) -> str:
    """``rank 2``, or ``ranks 0-3``."""
    return f"rank{'s' if len(ranks) > 1 else ''} {ranks_text(ranks)}"


def ranks_text(ranks: tuple[int, ...]) -> str:
    """``0-3`` for ranks that follow each other, else ``0, 2``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] + 1 == rank:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}\N{EN DASH}{b}" for a, b in runs)

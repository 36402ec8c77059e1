"""What is being done, on the terminal of whoever waits for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_CLEAR = "\r\x1b[K"


@contextmanager
def progress(what: str, rank: int = 0) -> Iterator[None]:
    """Says on rank 0 what a block does while it runs, if stderr is a terminal; the line goes when it ends.

    Args:
        what: such as ``capture the model``.
        rank: this process's.
    """
    stream = sys.stderr
    if rank or stream is None or not stream.isatty():
        yield
        return
    stream.write(f"{_CLEAR}tpcompile: {what} ...")
    stream.flush()
    try:
        yield
    finally:
        stream.write(_CLEAR)
        stream.flush()

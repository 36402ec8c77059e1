"""One call at a time over a group: ranks could take those of several threads in different orders."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from tpcompile.errors import TpCompileError

_TURNS: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)


@contextmanager
def own_turn(group_name: str) -> Iterator[None]:
    """A call over a group, or one inside of it.

    Raises:
        TpCompileError: another thread is in a call. Nothing says that the other ranks take the two in the
            same order, and one that does not would compute with what belongs to the other call.
    """
    turn = _TURNS[group_name]
    if not turn.acquire(blocking=False):
        raise TpCompileError(
            "another thread is in a call over the same ranks",
            where=threading.current_thread().name,
            todo="make all calls from one thread, or one after the other in the same order on every rank (a "
            "lock alone does not see to that)",
        )
    try:
        yield
    finally:
        turn.release()


@contextmanager
def turn_lent(group_name: str) -> Iterator[None]:
    """Lets other threads have the turn that this one has, until the end of the block, which waits for it."""
    turn = _TURNS[group_name]
    turn.release()
    try:
        yield
    finally:
        turn.acquire()

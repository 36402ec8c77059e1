"""A thread beside the one that computes: whether it gets python's lock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def turns_of_others(act: Callable[[], Any]) -> int:
    """How often another thread, which asks for it every hundredth of a second, has its turn meanwhile."""
    turns, done = 0, threading.Event()

    def count() -> None:
        nonlocal turns
        while not done.wait(0.01):
            turns += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        act()
    finally:
        done.set()
        thread.join()
    return turns

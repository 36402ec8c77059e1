"""Notes that ranks leave for each other in the store of the processes, where nobody waits for anybody."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist


def named(ranks: Sequence[int]) -> str:
    """Ranks as text."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def leave_note(topic: str, text: str) -> None:
    """Leaves a note of this rank for the others, or takes it back if it is empty."""
    _store().set(_key(topic, dist.get_rank()), text)


def read_notes(topic: str, ranks: Sequence[int], seconds: float) -> dict[int, str]:
    """The notes that ranks have left, or leave within some seconds."""
    store, end = _store(), time.monotonic() + seconds
    found: dict[int, str] = {}
    while True:
        for rank in ranks:
            key = _key(topic, rank)
            if rank not in found and store.check([key]) and (text := store.get(key).decode()):
                found[rank] = text
        if len(found) == len(ranks) or time.monotonic() > end:
            return found
        time.sleep(0.01)


def _key(topic: str, rank: int) -> str:
    return f"tpcompile/{topic}/{rank}"


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()

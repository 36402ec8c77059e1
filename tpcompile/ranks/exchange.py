"""The one way in which ranks talk: all give something for the same operation, and all get what all gave.

Every message begins with the name of its operation, so that ranks that are out of step find out. The first
rank gathers the messages and sends them on. Programs do neither, and gloo does not take a message of one kind
of collective for one of another: a rank that compares and one that runs a program wait in vain, unharmed.
"""

from __future__ import annotations

import pickle
import threading
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tpcompile.errors import RanksApart
from tpcompile.ir.torch_internals import BroadcastOptions, GatherOptions

from .lost_ranks import telling
from .own_groups import backend_of, limit_of, own_group
from .turns import own_turn

_HEAD = 512
"""Bytes that travel in any case: a size, the operation's name, and as much of what is given as fits."""

_SIZE, _END = 8, b"\0"
_PATIENCE = 1800.0
"""Seconds that ranks wait for one that has begun what they have begun, such as to capture a large model."""

_LOCK = threading.RLock()


def exchange(
    group: dist.ProcessGroup, what: str, value: Any, *, begun: bool = False, patience: float | None = None
) -> list[Any]:
    """What the ranks of a group give, by their places in the group.

    Args:
        group: the ranks.
        what: they are to do, as "capture the model"; equal on all ranks.
        value: what this rank gives; it can be pickled.
        begun: every rank is known to work on it, so that the others wait for it as long as it takes. A
            process that ends is noticed at once.
        patience: seconds to wait for the others; by default the group's limit.

    Raises:
        RanksApart: ranks are to do different things, or one does not come, or is gone.
        TpCompileError: another thread is in a call over these ranks.
    """
    if group.size() == 1:
        return [value]
    with own_turn(group.group_name), _LOCK, telling(own := own_group(group), what):
        return _exchange(own, what, value, begun, patience)


def name_of(group: dist.ProcessGroup, place: int) -> str:
    """The rank at a place of a group, as text."""
    return f"rank {dist.get_global_rank(group, place)}"


def _exchange(
    group: dist.ProcessGroup, what: str, value: Any, begun: bool, patience: float | None
) -> list[Any]:
    if backend_of(group) == "fake":  # of torch: it sends nothing, and has no time limit
        return [value] * group.size()
    if begun:
        patience = max(_PATIENCE, limit_of(group))
    data = pickle.dumps(value)
    name = what.encode()[: _HEAD // 2] + _END
    head = (len(data).to_bytes(_SIZE, "little") + name + data)[:_HEAD].ljust(_HEAD, _END)
    heads = _to_all(group, head, patience)
    names = [each[_SIZE:].partition(_END)[0] for each in heads]
    if len(set(names)) > 1:
        here = [f"{name_of(group, r)} is to {n.decode(errors='replace')}" for r, n in enumerate(names)]
        raise RanksApart(
            f"the ranks do different things: {', '.join(here)}",
            where="calls of tpcompile",
            todo="make the same calls in the same order on every rank",
        )
    sizes = [int.from_bytes(each[:_SIZE], "little") for each in heads]
    room = _HEAD - _SIZE - len(name)
    rests = [b""] * len(heads)
    if max(sizes) > room:
        largest = max(sizes) - room
        rests = _to_all(group, data[room:].ljust(largest, _END), None)
    begin = _SIZE + len(name)
    return [
        pickle.loads((head[begin:] + rest)[:size])
        for head, rest, size in zip(heads, rests, sizes, strict=True)
    ]


def _to_all(group: dist.ProcessGroup, data: bytes, patience: float | None) -> list[bytes]:
    """As many bytes from each rank, on every rank."""
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    everyone = mine.new_empty(group.size(), len(data), device="cpu")
    limit = timedelta(seconds=limit_of(group) if patience is None else patience)
    gather, broadcast = GatherOptions(), BroadcastOptions()
    gather.timeout = broadcast.timeout = limit
    parts: list[list[Tensor]] = [list(everyone)] if group.rank() == 0 else []
    group.gather(parts, [mine], gather).wait()
    group.broadcast([everyone], broadcast).wait()
    return [bytes(each.numpy()) for each in everyone]

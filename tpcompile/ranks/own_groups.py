"""The process groups that a sharded model talks over: its own, with a time limit of its own."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from tpcompile.errors import RanksApart, TpCompileError
from tpcompile.ir.check import short
from tpcompile.ir.torch_internals import resolve_process_group

from .notes import leave_note, named, read_notes

TIMEOUT = 600.0
"""Seconds that ranks wait for each other by default, as NCCL's watchdog does."""

_DESCRIPTION = "tpcompile"
_GROUPS: WeakKeyDictionary[dist.ProcessGroup, dict[float, str]] = WeakKeyDictionary()


def own_group(group: dist.ProcessGroup, timeout: float | None = None) -> dist.ProcessGroup:
    """A gloo group of ours over the ranks of a group of the user's, one for all models. All ranks call this.

    What the user sends over the other group cannot be mistaken for ours, and its time limit, which is half an
    hour by default, stays as it is. Over NCCL, messages need not pass through the cards.

    Args:
        group: the user's, or ours.
        timeout: seconds that an operation may wait for a rank; the user's group's limit, if that is less.
            None: as in the last group that was made.

    Raises:
        RanksApart: a rank did not come.
    """
    if group.group_desc == _DESCRIPTION or backend_of(group) == "fake":  # nobody is there
        return group
    known = _GROUPS.setdefault(group, {})
    timeout = timeout or next(reversed(known), TIMEOUT)
    if timeout in known and (found := find_group(known[timeout])) is not None:
        return found
    ranks = dist.get_process_group_ranks(group)
    made = make_group(ranks, f"{group.group_name}/here", min(timeout, limit_of(group)))
    made.barrier().wait()  # nobody meets for another group while the notes for this one are still there
    known[timeout] = made.group_name
    return made


def forget(group: dist.ProcessGroup) -> None:
    """Another group is made when the ranks of a group that has failed are to talk again."""
    for known in list(_GROUPS.values()):
        for timeout, name in list(known.items()):
            if name == group.group_name:
                del known[timeout]


def backend_of(group: dist.ProcessGroup, device_type: str | None = None) -> str:
    """What moves a group's tensors of a device, of any by default: "gloo", "nccl", ..."""
    return _backend(group, device_type).name().lower()


def limit_of(group: dist.ProcessGroup) -> float:
    """Seconds that an operation of a group waits for a rank."""
    limit: timedelta = _backend(group).options._timeout
    return limit.total_seconds()


def seconds_of(timeout: float | timedelta) -> float:
    """A time limit in seconds.

    Raises:
        TpCompileError: it is none.
    """
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < 1e9:
        raise TpCompileError(
            f"{short(timeout)} is not a time limit", where="timeout", todo="give a positive number of seconds"
        )
    return float(seconds)


def _backend(group: dist.ProcessGroup, device_type: str | None = None) -> Any:
    device = group._device_types[0] if device_type is None else torch.device(device_type)
    return group._get_backend(device)


def find_group(name: str, description: str | None = _DESCRIPTION) -> dist.ProcessGroup | None:
    """The group that was made under this name and description (None: any), if it was not destroyed since."""
    try:
        group: dist.ProcessGroup = resolve_process_group(name)  # type: ignore[arg-type]
    except RuntimeError:
        return None
    return group if description is None or group.group_desc == description else None


def make_group(
    ranks: Sequence[int], topic: str, limit: float, backend: str = "gloo", description: str = _DESCRIPTION
) -> dist.ProcessGroup:
    """Makes a process group. Only its ranks call this, once it is known that all of them are there.

    ``torch.distributed.new_group`` wants all ranks of the world, or makes up a name that depends on how many
    groups a rank has, and finds what an ended group of the same name has left in the store.

    Args:
        ranks: global ones, in the order of the group, the same on all; this one among them.
        topic: what the ranks meet for, the same on all of them.
        limit: seconds that they wait for each other, now and later.
        backend: what moves tensors.
        description: for torch's logs.

    Raises:
        RanksApart: a rank did not come.
    """
    if backend == "fake":  # nobody is there
        return cast(dist.ProcessGroup, dist.new_group(list(ranks), backend=backend))
    leave_note(topic, uuid.uuid4().hex)
    names = read_notes(topic, ranks, limit)
    missing = [rank for rank in ranks if rank not in names]
    if missing:
        leave_note(topic, "")
        raise RanksApart(
            f"{named(missing)} did not come to share a model within {limit:g} s",
            where=f"mesh over ranks {ranks}",
            todo="call tpcompile on every rank of the mesh, in the same order",
        )
    torch_groups: Any = dist.distributed_c10d
    place, name = ranks.index(dist.get_rank()), f"tpcompile-{names[ranks[0]]}"
    made, _ = torch_groups._new_process_group_helper(
        len(ranks),
        place,
        list(ranks),
        dist.Backend(backend),
        torch_groups._get_default_store(),
        name,
        timeout=timedelta(seconds=limit),
        group_desc=description,
    )
    torch_groups._world.pg_group_ranks[made] = {rank: i for i, rank in enumerate(ranks)}
    leave_note(topic, "")
    leave_note(f"{name}/lost", "")
    return cast(dist.ProcessGroup, made)

"""Says which ranks did not take part in an operation over all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from tpcompile.errors import RanksApart, TpCompileError

from .notes import leave_note, named, read_notes
from .own_groups import forget, limit_of

_GRACE = 2.0
"""Seconds in which the ranks that notice a failure leave their notes: they notice it together."""

_SIGNS = ("gloo/", "pair closure", "connectFullMesh")
"""Parts of the messages of gloo's errors, which are plain ``RuntimeError``."""

_LATE = "too late to "

_TODO = (
    "make the same calls in the same order on every rank, and see the other ranks' errors; they have to "
    "be started again. parallelize(..., timeout=seconds) says how long ranks wait for each other"
)


def is_loss(error: BaseException) -> bool:
    """Whether an error is that of a collective that could not be completed."""
    if isinstance(error, TpCompileError):
        return False
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SIGNS)


@contextmanager
def telling(group: dist.ProcessGroup | None, what: str) -> Iterator[None]:
    """Turns the failure of a collective into an error that says which ranks are missing, and for what."""
    try:
        yield
    except RuntimeError as error:
        if group is None or not is_loss(error):
            raise
        raise lost(group, what, error) from error


def lost(group: dist.ProcessGroup, what: str, error: BaseException) -> RanksApart:
    """The error for a collective that failed. The group is not used again.

    Args:
        group: the ranks.
        what: they were to do, as "capture the model".
        error: the collective's.
    """
    forget(group)
    everyone = dist.get_process_group_ranks(group)
    topic = f"{group.group_name}/lost"
    late = any(sign in str(error).lower() for sign in ("timeout", "timed out"))
    try:
        leave_note(topic, f"{_LATE if late else ''}{what}")
        notes = read_notes(topic, everyone, _GRACE)
    except RuntimeError:  # the store has gone with the rank that keeps it
        notes = {}
    late = late or any(note.startswith(_LATE) for note in notes.values())
    doing = {rank: note.removeprefix(_LATE) for rank, note in notes.items()}
    others = [f"rank {rank} was to {it}" for rank, it in doing.items() if it != what]
    missing = [rank for rank in everyone if rank not in notes]
    within = f"within {limit_of(group):g} s"
    if notes and missing:
        why = f"did not take part {within}" if late else "left, or its connection was lost"
        told = f"{named(missing)} {why}, while this rank was to {what}"
    elif others:
        told = f"the ranks do different things: this rank was to {what}, {', '.join(others)}"
    else:
        told = (
            f"the ranks did not all come {within} to {what}"
            if late
            else f"a rank was lost on the way to {what}"
        )
    reason = str(error).splitlines()[0].partition(" This is typically")[0]
    return RanksApart(told, where=reason, todo=_TODO)

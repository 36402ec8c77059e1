"""Makes ranks agree before they run: errors are shared, rank 0's plan is everybody's, plans are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from tpcompile.errors import TpCompileError

T = TypeVar("T")


def together(group: dist.ProcessGroup | None, what: str, do: Callable[[], T]) -> T:
    """Runs a step on every rank; if it fails on any, it fails on all (nobody waits for a rank that left).

    Raises:
        TpCompileError: this rank's own error, or the first other rank's.
    """
    result: T | None = None
    failure: BaseException | None = None
    try:
        result = do()
    except Exception as error:
        failure = error
    if group is not None:
        mine = None if failure is None else f"{type(failure).__name__}: {failure}"
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
        first = next(((r, e) for r, e in enumerate(everyone) if e is not None), None)
        if failure is None and first is not None:
            raise TpCompileError(
                f"rank {first[0]} failed to {what}: {first[1]}", todo="see that rank's error"
            )
    if failure is not None:
        raise failure
    return cast(T, result)


def from_first(group: dist.ProcessGroup | None, make: Callable[[], T], what: str = "make the plan") -> T:
    """The first rank's result, on every rank.

    Raises:
        TpCompileError: the first rank failed (there it is its own error).
    """
    if group is None or dist.get_world_size(group) == 1:
        return make()
    box: list[Any] = [None]
    failure: Exception | None = None
    first = dist.get_group_rank(group, dist.get_rank()) == 0
    if first:
        try:
            box = [("ok", make())]
        except Exception as error:
            failure = error
            box = [("failed", f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(box, group=group, group_src=0)
    if failure is not None:
        raise failure
    status, value = box[0]
    if status == "failed":
        raise TpCompileError(f"rank 0 could not {what}: {value}", todo="see rank 0's error")
    result: T = value
    return result


def compare(
    group: dist.ProcessGroup | None,
    what: str,
    lines: list[str],
    todo: str = "give every rank the same model, mode and example",
) -> str:
    """A fingerprint of a text that must be the same on all ranks.

    Raises:
        TpCompileError: it is not; the error shows the first line that differs.
    """
    fingerprint = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if group is None:
        return fingerprint
    prints: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(prints, fingerprint, group=group)
    if len(set(prints)) > 1:
        texts: list[Any] = [None] * len(prints)
        dist.all_gather_object(texts, lines, group=group)
        rank, line, here, there = _first_difference(texts)
        raise TpCompileError(
            f"the ranks have different {what}: rank 0 has {here!r}, rank {rank} has {there!r}",
            where=f"line {line}",
            todo=todo,
        )
    return fingerprint


def _first_difference(texts: list[list[str]]) -> tuple[int, int, str, str]:
    for rank, text in enumerate(texts[1:], 1):
        if text != texts[0]:
            for i in range(max(len(text), len(texts[0]))):
                a = texts[0][i] if i < len(texts[0]) else "(nothing)"
                b = text[i] if i < len(text) else "(nothing)"
                if a != b:
                    return rank, i + 1, a, b
    raise AssertionError("the texts are equal")

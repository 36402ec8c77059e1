"""Makes ranks agree before they run: errors are shared, rank 0's plan is everybody's, plans are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar, cast

import torch.distributed as dist

from tpcompile.errors import RanksApart, TpCompileError

from .exchange import exchange, name_of
from .lost_ranks import telling
from .progress import progress

T = TypeVar("T")


def together(group: dist.ProcessGroup | None, what: str, do: Callable[[], T]) -> T:
    """Runs a step on every rank; if it fails on any, it fails on all (nobody waits for a rank that left).

    Raises:
        TpCompileError: this rank's own error, or the first other rank's.
        RanksApart: a rank has failed while others were talking in the step.
    """
    if group is None or group.size() == 1:
        with progress(what):
            return do()
    exchange(group, what, None)
    result: T | None = None
    failure: BaseException | None = None
    try:
        with progress(what, group.rank()):
            result = do()
    except RanksApart:  # all ranks know
        raise
    except Exception as error:
        failure = error
    share_failure(group, what, failure, begun=True)
    return cast(T, result)


def share_failure(
    group: dist.ProcessGroup | None, what: str, failure: BaseException | None, *, begun: bool = False
) -> None:
    """Raises this rank's error, or the first other rank's.

    Args:
        group: the ranks.
        what: they did.
        failure: this rank's error, or None.
        begun: see ``exchange``.

    Raises:
        TpCompileError: another rank has failed; this rank's own error is raised as it is.
    """
    if group is not None:
        mine = None if failure is None else f"{type(failure).__name__}: {failure}"
        try:
            everyone = exchange(group, f"{what}: outcome", mine, begun=begun)
        except RanksApart as apart:  # the others talk in the step, and hear of it there
            if failure is None:
                raise
            raise failure from apart
        first = next((r for r, error in enumerate(everyone) if error is not None), None)
        if failure is None and first is not None:
            rank = name_of(group, first)
            what = f"{rank} failed to {what}: {everyone[first]}"
            raise TpCompileError(what, where=rank, todo=f"see {rank}'s error")
    if failure is not None:
        raise failure


@contextmanager
def telling_refusals(group: dist.ProcessGroup, what: str) -> Iterator[None]:
    """Around what a rank looks at before it talks: if it refuses, those that compare hear of it at once.

    Those that run something already wait for it until the time limit, as this rank does; then both know.

    Args:
        group: the ranks.
        what: is called.

    Raises:
        TpCompileError: this rank's own.
    """
    try:
        yield
    except TpCompileError as error:
        try:
            exchange(group, f"refuse {what}: {error.what}", None)
        except RanksApart as apart:  # the others have not refused it, or for another reason
            raise error from apart
        raise


def from_first(group: dist.ProcessGroup | None, make: Callable[[], T], what: str = "make the plan") -> T:
    """The first rank's result, on every rank.

    Raises:
        TpCompileError: the first rank failed (there it is its own error).
    """
    if group is None or group.size() == 1:
        with progress(what):
            return make()
    made: list[T] = []
    failure: Exception | None = None
    exchange(group, what, None)
    if group.rank() == 0:
        try:
            with progress(what):
                made = [make()]
        except Exception as error:
            failure = error
    why = None if failure is None else f"{type(failure).__name__}: {failure}"
    result, told = exchange(group, f"{what}: outcome", (made, why), begun=True)[0]
    if failure is not None:
        raise failure
    if told is not None:
        rank = name_of(group, 0)
        raise TpCompileError(f"{rank} could not {what}: {told}", where=rank, todo=f"see {rank}'s error")
    return cast(T, result[0])


def compare(
    group: dist.ProcessGroup | None,
    what: str,
    lines: Sequence[str],
    todo: str = "give every rank the same model, mode and example",
) -> str:
    """A fingerprint of a text that must be the same on all ranks.

    Raises:
        TpCompileError: it is not; the error shows the first line that differs.
    """
    fingerprint = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if group is None or group.size() == 1:
        return fingerprint
    if len(set(exchange(group, f"compare {what}", fingerprint))) > 1:
        texts = exchange(group, f"compare the lines of {what}", list(lines))
        place, line, here, there = _first_difference(texts)
        raise TpCompileError(
            f"the ranks have different {what}: {name_of(group, 0)} has {here!r}, "
            f"{name_of(group, place)} has {there!r}",
            where=f"line {line}",
            todo=todo,
        )
    return fingerprint


@contextmanager
def alike(group: dist.ProcessGroup | None, what: str, lines: Sequence[str] = ()) -> Iterator[None]:
    """Around a call that all ranks make together.

    Args:
        group: the ranks.
        what: is called.
        lines: with these arguments, which must be the same on all ranks.

    Raises:
        TpCompileError: on all ranks: they make different calls, or one of them does not come, or is lost.
    """
    todo = f"call {what} with the same arguments on every rank"
    compare(group, f"calls of {what}", lines, todo)
    with telling(group, f"complete {what}"):
        yield


def _first_difference(texts: list[list[str]]) -> tuple[int, int, str, str]:
    for rank, text in enumerate(texts[1:], 1):
        if text != texts[0]:
            for i in range(max(len(text), len(texts[0]))):
                a = texts[0][i] if i < len(texts[0]) else "(nothing)"
                b = text[i] if i < len(text) else "(nothing)"
                if a != b:
                    return rank, i + 1, a, b
    raise AssertionError("the texts are equal")

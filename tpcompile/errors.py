"""The one exception type that tpcompile raises on bad input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class TpCompileError(RuntimeError):
    """A request that tpcompile refuses, raised before anything is changed or sent.

    Args:
        what: what is wrong, one sentence.
        where: where in the model, plan, mesh or file; empty if the question makes no sense.
        todo: what the user can do about it; empty only if nothing can be done.
    """

    def __init__(self, what: str, *, where: str = "", todo: str = "") -> None:
        self.what, self.where, self.todo = str(what), str(where), str(todo)
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.todo:
            lines.append(f"  what to do: {self.todo}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        # Keeps the fields when the error crosses a process boundary (torch.multiprocessing pickles it).
        return (_rebuild, (type(self), self.what, self.where, self.todo))


class CannotCapture(TpCompileError):
    """A call cannot become one program: its python code no graph, or its graph too large to plan."""


class OnlyInParts(CannotCapture):
    """The model is the reason, whatever the call: python that depends on tensor values, a graph too large."""


class RanksApart(TpCompileError):
    """Ranks do different things, or one of them is gone: they cannot go on together."""


@contextmanager
def refusing(what: str, *, where: str, todo: str) -> Iterator[None]:
    """Turns any error inside of it into a refusal: for what reads a user's input with code that is not ours.

    Args:
        what: what cannot be done, without an end: the error's own text follows.
        where: as for ``TpCompileError``.
        todo: likewise.

    Raises:
        TpCompileError: for the first error; those of this type pass as they are.
    """
    try:
        yield
    except TpCompileError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        raise TpCompileError(f"{what}: {type(error).__name__}: {text}", where=where, todo=todo) from error


def _rebuild(kind: type[TpCompileError], what: str, where: str, todo: str) -> TpCompileError:
    return kind(what, where=where, todo=todo)

"""The one exception type that tpcompile raises on bad input."""

from __future__ import annotations


class TpCompileError(RuntimeError):
    """A request that tpcompile refuses, raised before anything is changed or sent.

    Args:
        what: what is wrong, one sentence.
        where: where in the model, plan, mesh or file; empty if the question makes no sense.
        todo: what the user can do about it; empty only if nothing can be done.
    """

    def __init__(self, what: str, *, where: str = "", todo: str = "") -> None:
        self.what = what
        self.where = where
        self.todo = todo
        lines = [what]
        if where:
            lines.append(f"  where: {where}")
        if todo:
            lines.append(f"  what to do: {todo}")
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


def _rebuild(kind: type[TpCompileError], what: str, where: str, todo: str) -> TpCompileError:
    return kind(what, where=where, todo=todo)

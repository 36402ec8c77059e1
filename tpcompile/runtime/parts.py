"""What cannot be captured as a whole runs as the python that it is, over parts that are captured."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import nn

from tpcompile.errors import CannotCapture, OnlyInParts, TpCompileError

from .add_program import add_program
from .guards import Entry, original_call
from .state import State


def try_first(
    runtime: State, model: nn.Module, bound: dict[str, Any], *, optional: bool = False
) -> TpCompileError | None:
    """Captures a call; returns why it cannot be captured if its parts are to be captured instead.

    Args:
        runtime: the model's.
        model: the model.
        bound: the call.
        optional: nobody asked for the call: it need not be one that can be captured.

    Raises:
        TpCompileError: it is refused for another reason, or is not to be composed.
    """
    try:
        add_program(runtime, model, bound)
    except TpCompileError as error:
        if not _wants_parts(error, True if optional else runtime.compiler.options.compose):
            raise
        return error
    return None


def compose_call(
    runtime: State, model: nn.Module, path: str, names: tuple[str, ...], error: TpCompileError
) -> bool:
    """Whether a call that could not be captured runs as python over the module's parts from now on."""
    wanted = _wants_parts(error, runtime.compiler.options.compose)
    if not wanted:
        return False
    runtime.composed.add((path, names))
    runtime.note_composed(model)
    where = f"{path or type(model).__name__}({', '.join(names)})"
    warnings.warn(
        f"{where} runs as python over parts that are captured by themselves, because it cannot be "
        f"captured as a whole: {error}",
        stacklevel=2,
    )
    return True


def run_parts(runtime: State, model: nn.Module, bound: dict[str, Any], path: str, entry: Entry | None) -> Any:
    """Runs the python code of a module; what its parts do to themselves changes no settings."""
    runtime.running += 1
    try:
        forward = runtime.lifted or functools.partial(runtime.original.forward, model)
        return original_call(model, forward, path, (entry or runtime).signature, bound)
    finally:
        runtime.running -= 1


def try_parts(runtime: State, model: nn.Module, bound: dict[str, Any], path: str, entry: Entry | None) -> Any:
    """As ``_run_parts``, for a first time: if python fails as well, the call is wrong, not the model."""
    try:
        return run_parts(runtime, model, bound, path, entry)
    except Exception:
        runtime.composed.discard((path, tuple(bound)))
        runtime.note_composed(model)
        raise


def _wants_parts(error: TpCompileError, asked: bool | None) -> bool:
    """Whether an error, of this rank or of another, says that parts are to be captured instead."""
    kinds = {True: (CannotCapture, OnlyInParts), None: (OnlyInParts,), False: ()}[asked]
    return any(isinstance(error, kind) or kind.__name__ in error.what for kind in kinds)

"""Copies a sharded model: its weights and configuration are the copy's own, what was compiled is shared."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from tpcompile.errors import TpCompileError

from .guards import guard_submodules, without_guards
from .make_program import bind_program
from .settings import Settings

if TYPE_CHECKING:
    from .runtime import Runtime


def copy_model(model: nn.Module, runtime: Runtime, memo: dict[int, Any]) -> nn.Module:
    """A deep copy of a sharded model.

    Args:
        model: the sharded model.
        runtime: its runtime.
        memo: ``copy.deepcopy``'s.

    Raises:
        TpCompileError: the ranks follow this one, and would not copy it.
    """
    if runtime.leader is not None:
        raise TpCompileError(
            "the other ranks would not copy the model with this one",
            where="copy.deepcopy",
            todo="copy it on all ranks, before serve_ranks",
        )
    kind: Any = type(model)
    with without_guards(model), as_original(model, runtime):
        copied: nn.Module = copy.deepcopy(model, memo)
    runtime.copies += 1
    own = replace(
        runtime,
        number=(*runtime.number, runtime.copies),
        copies=0,
        programs=[],
        caches=dict(runtime.caches),
        composed=set(runtime.composed),
        hooks=list(runtime.hooks),
        settings=Settings(runtime.settings.types),
        lifted=copied.__dict__.pop("forward", None),
    )
    copied._tp = own  # type: ignore[assignment]
    copied.__class__ = kind
    guard_submodules(copied)
    own.programs = [
        bind_program(program, copied, own.compiler.rank, own.original_of(copied))
        for program in runtime.programs
        if program.reads.hold(runtime.settings.state)
    ]
    own.settings.read |= runtime.settings.read
    return copied


@contextmanager
def as_original(model: nn.Module, runtime: Runtime) -> Iterator[None]:
    """Takes the runtime away from a model, and gives it its original class."""
    kind: Any = type(model)
    del model.__dict__["_tp"]
    model.__class__ = runtime.original
    outer = model.__dict__.pop("forward", None)
    if runtime.lifted is not None:
        model.__dict__["forward"] = runtime.lifted
    try:
        yield
    finally:
        model.__class__ = kind
        model.__dict__["_tp"] = runtime
        model.__dict__.pop("forward", None)
        if outer is not None:
            model.__dict__["forward"] = outer

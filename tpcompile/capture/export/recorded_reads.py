"""Notes which attributes of modules are read while a model is traced."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import nn

from tpcompile.errors import CannotCapture

from .look_inside import is_librarys, same
from .python_state import MISSING, is_ours


@contextmanager
def recorded_reads(
    model: nn.Module, strangers: list[tuple[nn.Module, str]] | None = None
) -> Iterator[set[tuple[str, str]]]:
    """Notes which attributes of the model's modules are read in the block.

    Args:
        model: the model.
        strangers: is given what is read of modules that are not part of it: in a plain list, a global.

    Yields:
        Paths and names; also of attributes that are not there, or that a module's class has.

    Raises:
        CannotCapture: an attribute of a module that is not part of the model has changed.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    found: set[tuple[int, str]] = set()
    reads: set[tuple[str, str]] = set()
    others: dict[tuple[int, str], tuple[nn.Module, Any]] = {}

    def look_up(module: nn.Module, name: str) -> Any:
        if name == "__dict__" and not is_librarys(sys._getframe(1).f_globals["__name__"], "tpcompile"):
            found.update((id(module), key) for key in object.__getattribute__(module, name))
        found.add((id(module), name))
        if id(module) not in paths and (id(module), name) not in others and not _is_tracers(module, name):
            own = object.__getattribute__(module, "__dict__")
            others[id(module), name] = module, own.get(name, MISSING)
        return object.__getattribute__(module, name)

    with patch.object(nn.Module, "__getattribute__", look_up, create=True):
        yield reads
    reads |= {(paths[key], name) for key, name in found if key in paths and not is_ours(name)}
    for (_, name), (module, value) in others.items():
        if not same(module.__dict__.get(name, MISSING), value):
            module.__dict__[name] = value
            raise CannotCapture(
                f"the model's forward changes {name} of a {type(module).__name__} that is no part of it",
                where=name,
                todo="keep modules in attributes, nn.ModuleList and nn.ModuleDict",
            )
    if strangers is not None:
        strangers += [(module, name) for (_, name), (module, _) in others.items()]


def _is_tracers(module: nn.Module, name: str) -> bool:
    """Whether an attribute is torch's or ours, or belongs to a module that tracing itself has made."""
    made = ("torch.fx", "torch.export", "torch._", "tpcompile")
    return type(module) is nn.Module or is_ours(name) or type(module).__module__.startswith(made)


def hooked(model: nn.Module) -> set[tuple[str, str]]:
    """The tables of hooks that a trace runs: without these hooks, or with others, it is another program."""
    tables = ("_forward_hooks", "_forward_pre_hooks")
    return {(path, t) for path, module in model.named_modules() for t in tables if module.__dict__[t]}

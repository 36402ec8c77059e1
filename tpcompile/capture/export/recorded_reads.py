"""Notes which attributes of modules are read while a model is traced."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import nn

from tpcompile.errors import CannotCapture

from .look_inside import is_librarys
from .outer_places import place_of
from .outer_state import KeptPlace
from .python_state import is_ours


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
    others: dict[tuple[int, str], tuple[nn.Module, KeptPlace]] = {}
    made: dict[int, nn.Module] = {}  # in the block; kept alive, so that no other one gets its id

    def look_up(module: nn.Module, name: str) -> Any:
        own = object.__getattribute__(module, "__dict__")
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        if name == "__dict__" and not is_librarys(caller, "tpcompile"):
            found.update((id(module), key) for key in own)
        found.add((id(module), name))
        if "_parameters" not in own:
            made[id(module)] = module
        known = id(module) in paths or id(module) in made or (id(module), name) in others
        if not known and not _is_tracers(module, name):
            others[id(module), name] = module, KeptPlace(place_of(module, name))
        return object.__getattribute__(module, name)

    try:
        with patch.object(nn.Module, "__getattribute__", look_up, create=True):
            yield reads
    finally:
        changed = [place for place, (_, kept) in others.items() if kept.put_back()]
    reads |= {(paths[key], name) for key, name in found if key in paths and not is_ours(name)}
    for place in changed:
        raise CannotCapture(
            f"the model's forward changes {place[1]} of a {type(others[place][0]).__name__} that is no part "
            "of it",
            where=place[1],
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

"""Places outside of a model's modules, whose values its python names."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from contextvars import ContextVar
from itertools import starmap
from typing import Any, NamedTuple

from torch import nn

from .shots import MISSING


class Outer(NamedTuple):
    """A place outside of the modules.

    Attributes:
        name: what to call it.
        owner: a table of globals, the cell of a closure, a class, a function with defaults, a context
            variable, or the environment.
        key: the value's key or attribute there.
    """

    name: str
    owner: Any
    key: str

    def look(self) -> Any:
        """Its value, or ``MISSING``."""
        if isinstance(self.owner, ContextVar):
            return self.owner.get(MISSING)
        if isinstance(self.owner, dict) or self.owner is os.environ:
            return self.owner.get(self.key, MISSING)
        if isinstance(
            self.owner, type
        ):  # a class method as it was written: else it is a new object each time
            return inspect.getattr_static(self.owner, self.key, MISSING)
        return getattr(self.owner, self.key, MISSING)

    def put(self, value: Any) -> None:
        """Sets its value, or removes it; a context variable that had none keeps the one that it has."""
        if isinstance(self.owner, ContextVar):
            if value is not MISSING:
                self.owner.set(value)
        elif not isinstance(self.owner, dict) and self.owner is not os.environ:
            setattr(self.owner, self.key, value)
        elif value is MISSING:
            self.owner.pop(self.key, None)
        else:
            self.owner[self.key] = value


def places_of(strangers: Iterable[tuple[nn.Module, str]]) -> list[Outer]:
    """Attributes and weights of modules that are not part of a model."""
    return list(starmap(place_of, strangers))


def place_of(module: nn.Module, name: str) -> Outer:
    """An attribute or a weight of a module, as a place."""
    own: dict[str, Any] = object.__getattribute__(module, "__dict__")
    tables = (own["_parameters"], own["_buffers"], own["_modules"], own)
    owner = next((table for table in tables if name in table), own)
    return Outer(f"{type(module).__qualname__}.{name}", owner, name)


def place_of_variable(variable: ContextVar[Any]) -> Outer:
    """A context variable, as a place."""
    return Outer(f"the context variable {variable.name}", variable, "")

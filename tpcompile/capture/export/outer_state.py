"""What a model's python names outside of its modules: globals, closures, defaults, data of classes."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from tpcompile.errors import CannotCapture

from .python_state import MISSING, shot

_LIBRARIES = {"torch", "numpy", "typing", "collections", "functools", "logging", "warnings", "os", "sys"}
_LIBRARIES |= {"math", "builtins", "tpcompile"}
_REFILLED = (list, dict, set, deque)


class Outer(NamedTuple):
    """A place outside of the modules.

    Attributes:
        name: what to call it.
        owner: a table of globals, the cell of a closure, a class, or a function with defaults.
        key: the value's key or attribute there.
    """

    name: str
    owner: Any
    key: str

    def look(self) -> Any:
        """Its value, or ``MISSING``."""
        if isinstance(self.owner, dict):
            return self.owner.get(self.key, MISSING)
        return getattr(self.owner, self.key, MISSING)

    def put(self, value: Any) -> None:
        """Sets its value."""
        if isinstance(self.owner, dict):
            self.owner[self.key] = value
        else:
            setattr(self.owner, self.key, value)


def outer_places(model: nn.Module) -> list[Outer]:
    """All that the functions of a model name, and the functions that these name, but for libraries'."""
    functions: list[types.FunctionType] = []
    methods: list[tuple[type, str]] = []
    for module in model.modules():
        methods.append((type(module), "forward"))
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        functions += filter(None, map(_function, (*hooks, *module.__dict__.values())))
    found: dict[tuple[int, str], Outer] = {}
    seen: set[tuple[type, str]] = set()
    while functions or methods:
        if methods and (method := methods.pop()) not in seen:
            seen.add(method)
            kind, name = method
            value = getattr(kind, name, None)
            function = _function(value)
            if function is not None and not _is_librarys(function):
                functions.append(function)
                methods += [
                    (kind, n) for n in _names(function) if hasattr(kind, n) and not hasattr(nn.Module, n)
                ]
            elif name != "forward" and _matters(value):
                place = Outer(f"{kind.__qualname__}.{name}", kind, name)
                found.setdefault((id(kind), name), place)
        while functions:
            for place in _named(functions.pop()):
                if found.setdefault((id(place.owner), place.key), place) is place:
                    inner = _function(place.look())
                    functions += [] if inner is None or _is_librarys(inner) else [inner]
    return list(found.values())


@contextmanager
def unchanged_outside(model: nn.Module) -> Iterator[list[Outer]]:
    """Puts back what the block changes outside of the model's modules.

    Yields:
        The places that its functions name.

    Raises:
        CannotCapture: there is such a change.
    """
    before, places = [], outer_places(model)
    for place in places:
        value = place.look()
        copied = type(value)(value) if type(value) in _REFILLED else None
        before.append((place, value, copied, shot(value)))
    changed = []
    try:
        yield places
    finally:
        for place, value, copied, unchanged in before:
            if not unchanged(place.look()):
                changed.append(place.name)
                if place.look() is not value:
                    place.put(value)
                if copied is not None:
                    value.clear()
                    value.extend(copied) if isinstance(value, list | deque) else value.update(copied)
    if changed:
        raise CannotCapture(
            f"the model's forward changes {changed[0]}",
            where=changed[0],
            todo="keep what forward changes in attributes of the model, best in buffers",
        )


def _function(value: Any) -> types.FunctionType | None:
    """The python function in a method, a property, or a partial call."""
    while isinstance(value, types.MethodType | staticmethod | classmethod | property | functools.partial):
        value = next(
            v for n in ("__func__", "fget", "func") if (v := getattr(value, n, MISSING)) is not MISSING
        )
    return value if isinstance(value, types.FunctionType) else None


def _names(function: types.FunctionType) -> set[str]:
    """The names in a function, in those inside of it, and in that which it wraps."""
    names: set[str] = set()
    codes: list[Any] = [function.__code__]
    wrapped = function.__dict__.get("__wrapped__")
    if isinstance(wrapped, types.FunctionType):
        codes.append(wrapped.__code__)
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return names


def _named(function: types.FunctionType) -> Iterator[Outer]:
    """What one function names: globals, cells, defaults."""
    table = function.__globals__
    for name in sorted(_names(function) & table.keys()):
        if _matters(table[name]):
            yield Outer(f"the global {table.get('__name__')}.{name}", table, name)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        place = Outer(f"{name}, a variable around {function.__qualname__}", cell, "cell_contents")
        if cell != types.CellType() and _matters(place.look()):
            yield place
    for key in ("__defaults__", "__kwdefaults__"):
        if getattr(function, key):
            yield Outer(f"a default of {function.__qualname__}", function, key)


def _matters(value: Any) -> bool:
    """Whether a value can change what a program computes."""
    kinds = (types.ModuleType, type, nn.Module, types.BuiltinFunctionType)
    return (
        not isinstance(value, kinds) and not _is_librarys(value) and not _is_librarys(type(value), "builtins")
    )


def _is_librarys(value: Any, *but: str) -> bool:
    name = (getattr(value, "__module__", None) or "").partition(".")[0]
    return name in _LIBRARIES and name not in but

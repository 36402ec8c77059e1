"""What a model's python names outside of its modules: globals, closures, defaults, data of classes."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from itertools import starmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from .look_inside import content
from .opaque_values import is_opaque
from .python_state import DEEPEST, MISSING

_LIBRARIES = {"torch", "numpy", "typing", "collections", "functools", "logging", "warnings", "os", "sys"}
_LIBRARIES |= {"math", "builtins", "tpcompile"}
CACHED = functools._lru_cache_wrapper


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


def outer_places(model: nn.Module, walked: list[types.FunctionType] | None = None) -> list[Outer]:
    """All that the functions of a model name, and the functions that these name, but for libraries'.

    Args:
        model: the model.
        walked: is given these functions.
    """
    walk = _Walk(walked if walked is not None else [])
    for module in model.modules():
        walk.methods.append((type(module), "forward"))
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        held = filter(None, map(_function, (*hooks, *module.__dict__.values())))
        walk.functions += [f for f in held if _belongs_to(f, type(module))]
        for name, value in module.__dict__.items():
            walk.held.setdefault(name, set()).update(_methods_in(value))
    while walk.functions or walk.methods:
        walk.step()
    return list(walk.found.values())


def places_of(strangers: Iterable[tuple[nn.Module, str]]) -> list[Outer]:
    """Attributes and weights of modules that are not part of a model."""
    return list(starmap(place_of, strangers))


def place_of(module: nn.Module, name: str) -> Outer:
    """An attribute or a weight of a module, as a place."""
    own: dict[str, Any] = object.__getattribute__(module, "__dict__")
    tables = (own["_parameters"], own["_buffers"], own["_modules"], own)
    owner = next((table for table in tables if name in table), own)
    return Outer(f"{type(module).__qualname__}.{name}", owner, name)


class _Walk:
    """What is found on the way from function to function.

    Attributes:
        functions: those to look at.
        methods: a class and a name in it, to look at.
        found: the places.
        held: methods of the user's objects, by the attribute that they are in.
        names: all that functions have named so far; "" stands for what has no name.
    """

    def __init__(self, walked: list[types.FunctionType]) -> None:
        self.functions: list[types.FunctionType] = []
        self.methods: list[tuple[type, str]] = []
        self.found: dict[tuple[int, str], Outer] = {}
        self.held: dict[str, set[tuple[type, str]]] = {}
        self.names = {""}
        self._walked = walked
        self._seen: set[tuple[type, str]] = set()

    def step(self) -> None:
        """Looks at one method, and at all functions."""
        if self.methods and (method := self.methods.pop()) not in self._seen:
            self._seen.add(method)
            self._look_at(*method)
        while self.functions:
            function = self.functions.pop()
            self._walked.append(function)
            self.names |= _names(function)
            self.methods += _methods(function)
            for place in _named(function):
                if self.found.setdefault((id(place.owner), place.key), place) is place:
                    inner = _function(place.look())
                    self.functions += [inner] if inner is not None and _belongs_to(inner, function) else []
                    self.held.setdefault("", set()).update(_methods_in(place.look()))
        if not self.methods:  # python calls those between underscores without a name, as `with` does
            every = set().union(*(found for name, found in self.held.items() if name in self.names))
            named = [m for m in every - self._seen if m[1] in self.names or m[1].startswith("__")]
            self.methods = sorted(named, key=lambda m: (m[0].__qualname__, m[1]))

    def _look_at(self, kind: type, name: str) -> None:
        value = getattr(kind, name, None)
        if isinstance(value, CACHED):
            self._add(kind, name)
        if own := _own_functions(kind, name):
            self.functions += own.values()
            for parent in [*own][issubclass(kind, nn.Module) :]:  # a module's own are its attributes
                self._add(parent, name)
            named = {n for function in own.values() for n in _names(function)}
            self.methods += [(kind, n) for n in named if hasattr(kind, n) and not hasattr(nn.Module, n)]
        elif name != "forward" and _matters(value):
            self._add(kind, name)

    def _add(self, kind: type, name: str) -> None:
        self.found.setdefault((id(kind), name), Outer(f"{kind.__qualname__}.{name}", kind, name))


def _methods_in(value: Any, depth: int = 0, seen: set[int] | None = None) -> list[tuple[type, str]]:
    """The methods of the user's objects in a value."""
    seen = set() if seen is None else seen
    value = value.__self__ if isinstance(value, types.MethodType) else value
    inside = content(value)
    if inside is None or depth > DEEPEST or id(value) in seen:
        return []
    seen.add(id(value))
    kind = type(value)
    own = [c for c in kind.__mro__ if _is_users(c.__module__)]
    found = [(kind, name) for c in own for name, held in vars(c).items() if _function(held) is not None]
    items = inside.values() if isinstance(inside, Mapping) else inside
    return found + [method for item in items for method in _methods_in(item, depth + 1, seen)]


def _function(value: Any) -> types.FunctionType | None:
    """The python function in a method, a property, a partial call, or one that keeps its results."""
    wrapped = (types.MethodType, staticmethod, classmethod, property, functools.partial, CACHED)
    while isinstance(value, wrapped):
        names = ("__func__", "fget", "func", "__wrapped__")
        value = next(v for n in names if (v := getattr(value, n, MISSING)) is not MISSING)
    return value if isinstance(value, types.FunctionType) else None


def _names(function: types.FunctionType) -> set[str]:
    """The names in a function, in those inside of it, and in that which it wraps."""
    return {name for code in _codes(function) for name in code.co_names}


def _codes(function: types.FunctionType) -> Iterator[types.CodeType]:
    codes: list[Any] = [function.__code__]
    wrapped = function.__dict__.get("__wrapped__")
    if isinstance(wrapped, types.FunctionType):
        codes.append(wrapped.__code__)
    while codes:
        code = codes.pop()
        yield code
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]


def _variables(function: types.FunctionType) -> Iterator[str]:
    """Names that can be those of environment variables, in a function that reads the environment."""
    names = _names(function)
    if {"environ", "getenv"} & names:
        texts = [c for code in _codes(function) for c in code.co_consts]
        texts += [function.__globals__.get(name) for name in names]
        yield from (text for text in texts if isinstance(text, str) and text.isidentifier())


def _globals(function: types.FunctionType) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The globals that a function names, and what it may name in those that are modules of the user's."""
    names, tables = sorted(_names(function)), [function.__globals__]
    for table in tables:  # which grows
        for name in names:
            if name in table:
                value = table[name]
                yield table, name, value
                if isinstance(value, types.ModuleType) and _is_users(value.__name__):
                    tables += [vars(value)] if all(vars(value) is not t for t in tables) else []


def _methods(function: types.FunctionType) -> list[tuple[type, str]]:
    """What a function may name in the classes of the user's that it names."""
    named = [value for *_, value in _globals(function) if isinstance(value, type)]
    kinds = [kind for kind in named if _is_users(kind.__module__)]
    return [
        (kind, name)
        for kind in kinds
        for name in sorted(_names(function))
        if hasattr(kind, name) and (name == "forward" or not hasattr(nn.Module, name))
    ]


def _own_functions(kind: type, name: str) -> dict[type, types.FunctionType]:
    """The functions of a method in a class and in its parents (``super()``), but for libraries'."""
    every = {c: _function(vars(c)[name]) for c in kind.__mro__ if name in vars(c)}
    return {c: function for c, function in every.items() if function and not _is_librarys(function)}


def _belongs_to(function: types.FunctionType, code: types.FunctionType | type) -> bool:
    """Whether a function is part of the code that calls it, or the user's: others keep what they like.

    einops, for one, fills a table at its first call.
    """
    mine, theirs = ((each.__module__ or "").partition(".")[0] for each in (code, function))
    return not _is_librarys(function) and (mine == theirs or _is_users(function.__module__ or ""))


def _is_users(name: str) -> bool:
    """Whether a python module, by its name, is neither python's nor installed."""
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    known = name.partition(".")[0] in _LIBRARIES | sys.stdlib_module_names
    return not known and not {"site-packages", "dist-packages"} & {*Path(file).parts}


def _named(function: types.FunctionType) -> Iterator[Outer]:
    """What one function names: globals, context and environment variables, cells, defaults."""
    for table, name, value in _globals(function):
        if _matters(value):
            yield Outer(f"the global {table.get('__name__')}.{name}", table, name)
        if isinstance(value, ContextVar):
            yield Outer(f"the context variable {value.name}", value, "")
    for name in _variables(function):
        yield Outer(f"the environment variable {name}", os.environ, name)
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
    of_kind = _is_librarys(type(value), "builtins", "functools")
    if isinstance(value, Tensor | np.generic) or is_opaque(value):
        return True
    return not isinstance(value, kinds) and not _is_librarys(value) and not of_kind


def _is_librarys(value: Any, *but: str) -> bool:
    name = (getattr(value, "__module__", None) or "").partition(".")[0]
    return name in _LIBRARIES and name not in but

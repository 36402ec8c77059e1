"""What a model's python names outside of its modules: globals, closures, defaults, data of classes."""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from .look_inside import OURS, beside_items, content
from .opaque_values import is_opaque
from .outer_places import Outer, place_of_variable
from .shots import DEEPEST, MISSING

_LIBRARIES = {"torch", "numpy", "typing", "collections", "functools", "logging", "warnings", "os", "sys"}
_LIBRARIES |= {"math", "builtins", "tpcompile"}
_KNOWN = _LIBRARIES | sys.stdlib_module_names
_ASKING = {"getattr", "hasattr", "attrgetter", "__dict__", "vars"}
"""Functions that give an attribute of a name that is text."""

CACHED = functools._lru_cache_wrapper


def outer_places(model: nn.Module, walked: list[types.FunctionType] | None = None) -> list[Outer]:
    """All that the functions of a model name, and the functions that these name, but for libraries'.

    Args:
        model: the model.
        walked: is given these functions.
    """
    walk = _Walk(walked if walked is not None else [])
    for module in model.modules():
        walk.members.append((type(module), "forward"))
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        held = filter(None, map(_function, (*hooks, *module.__dict__.values())))
        walk.functions += [f for f in held if _belongs_to(f, type(module))]
        for name, value in module.__dict__.items():
            if not name.startswith(OURS):
                walk.hold(name, value)
    while walk.functions or walk.members:
        walk.step()
    return list(walk.found.values())


_Member = tuple[Any, str]
_OWNERS = (ContextVar, types.FunctionType, types.ModuleType, type)
_WITHOUT = frozenset({type(None), bool, int, float, complex, str, bytes})
"""Types of values that nothing of the user's is in; a class derived from one may be."""


class _Walk:
    """What is found on the way from function to function.

    Attributes:
        functions: those to look at.
        members: a class, a python module or a function, and a name in it, to look at; of a function and a
            context variable, "" is what it does.
        found: the places.
        names: all that functions have named so far; "" stands for what has no name.
    """

    def __init__(self, walked: list[types.FunctionType]) -> None:
        self.functions: list[types.FunctionType] = []
        self.members: list[_Member] = []
        self.found: dict[tuple[int, str], Outer] = {}
        self.names = {""}
        self._held: dict[str, set[_Member]] = {}
        self._walked = walked
        self._seen: set[_Member] = set()

    def hold(self, name: str, value: Any) -> None:
        """Notes what of the user's is in a value, which counts if functions name the attribute that it is."""
        self._held.setdefault(name, set()).update(_members_in(value, set()))

    def step(self) -> None:
        """Looks at one member, and at all functions."""
        if self.members and (member := self.members.pop()) not in self._seen:
            self._seen.add(member)
            (self._look_at_class if isinstance(member[0], type) else self._look_at)(*member)
        while self.functions:
            function = self.functions.pop()
            self._walked.append(function)
            self.names |= _names(function)
            self.members += _methods(function)
            for place in _named(function):
                if self.found.setdefault((id(place.owner), place.key), place) is place:
                    inner = _function(place.look())
                    self.functions += [inner] if inner is not None and _belongs_to(inner, function) else []
                    self.hold("", place.look())
        if not self.members:  # python calls those between underscores without a name, as `with` does
            every = set().union(*(found for name, found in self._held.items() if name in self.names))
            named = [m for m in every - self._seen if m[1] in self.names or m[1].startswith("__")]
            self.members = sorted(named, key=lambda m: (getattr(m[0], "__qualname__", ""), m[1]))

    def _look_at_class(self, kind: type, name: str) -> None:
        value = getattr(kind, name, None)
        if isinstance(value, CACHED):
            self._add(kind, name)
        if own := _own_functions(kind, name):
            self.functions += own.values()
            for parent in [*own][issubclass(kind, nn.Module) :]:  # a module's own are its attributes
                self._add(parent, name)
            named = {n for function in own.values() for n in _names(function)}
            self.members += [(kind, n) for n in named if hasattr(kind, n) and not hasattr(nn.Module, n)]
        elif name != "forward" and (_matters(value) or isinstance(value, type)):
            self._add(kind, name)
            self.hold("", value)

    def _look_at(self, owner: Any, name: str) -> None:
        """At what is in a python module, at what a function holds or does, or at a context variable."""
        if name:
            table = vars(owner)
            self.found.setdefault((id(table), name), Outer(f"{owner.__name__}.{name}", table, name))
            self.hold("", table[name])
        elif isinstance(owner, ContextVar):
            self.found.setdefault((id(owner), ""), place_of_variable(owner))
        else:
            self.functions.append(owner)

    def _add(self, kind: type, name: str) -> None:
        self.found.setdefault((id(kind), name), Outer(f"{kind.__qualname__}.{name}", kind, name))


def _members_in(value: Any, seen: set[int], depth: int = 0) -> list[_Member]:
    """What code may use of the user's classes, objects, functions and python modules in a value."""
    value = value.__self__ if isinstance(value, types.MethodType) else value
    if isinstance(value, nn.Module | Tensor) or type(value) in _WITHOUT:
        return []
    is_owner = isinstance(value, _OWNERS)
    if id(value) in seen or (depth > DEEPEST and not is_owner):
        return []
    seen.add(id(value))
    if is_owner:
        return _members(value)
    kept = [table for table in (content(value), beside_items(value)) if table is not None]
    items = [item for table in kept for item in (table.values() if isinstance(table, Mapping) else table)]
    return [m for item in (type(value), *items) for m in _members_in(item, seen, depth + 1)]


def _members(owner: Any) -> list[_Member]:
    """What code may use of a user's class, function or python module, or of a context variable."""
    if isinstance(owner, ContextVar):
        return [(owner, "")]
    if isinstance(owner, types.FunctionType):
        return [(owner, name) for name in ("", *vars(owner))] if _is_users(owner.__module__ or "") else []
    if isinstance(owner, types.ModuleType):
        names = filter(str.isidentifier, vars(owner)) if _is_users(owner.__name__) else ()
        return [(owner, name) for name in names]
    own = [c for c in owner.__mro__ if _is_users(c.__module__)]
    every = [(name, value) for c in own for name, value in vars(c).items()]
    return [(owner, n) for n, v in every if _function(v) is not None or not n.startswith("__")]


def _function(value: Any) -> types.FunctionType | None:
    """The python function in a method, a property, a partial call, or one that keeps its results."""
    wrapped = (types.MethodType, staticmethod, classmethod, property, functools.partial, CACHED)
    while isinstance(value, wrapped):
        names = ("__func__", "fget", "func", "__wrapped__")
        value = next(v for n in names if (v := getattr(value, n, MISSING)) is not MISSING)
    return value if isinstance(value, types.FunctionType) else None


def _names(function: types.FunctionType) -> set[str]:
    """The names in a function, in those inside of it, and in that which it wraps."""
    names = {name for code in _codes(function) for name in code.co_names}
    if names.isdisjoint(_ASKING):
        return names
    texts = (c for code in _codes(function) for c in code.co_consts if isinstance(c, str))
    return names.union(filter(str.isidentifier, texts))


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
    kinds, names = [kind for kind in named if _is_users(kind.__module__)], sorted(_names(function))
    return [
        (kind, name)
        for kind in kinds
        for name in names
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
    if name.partition(".")[0] in _KNOWN:
        return False
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return not {"site-packages", "dist-packages"} & {*Path(file).parts}


def _named(function: types.FunctionType) -> Iterator[Outer]:
    """What one function names: globals, context and environment variables, cells, defaults."""
    for table, name, value in _globals(function):
        if _matters(value):
            yield Outer(f"the global {table.get('__name__')}.{name}", table, name)
        if isinstance(value, ContextVar):
            yield place_of_variable(value)
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

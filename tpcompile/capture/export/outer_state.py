"""What a model's python names outside of its modules: globals, closures, defaults, data of classes."""

from __future__ import annotations

import functools
import os
import random
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tpcompile.errors import CannotCapture

from .opaque_values import is_iterator, is_opaque, put_back, refuse_iterator, snapshot
from .python_state import MISSING, shot

_LIBRARIES = {"torch", "numpy", "typing", "collections", "functools", "logging", "warnings", "os", "sys"}
_LIBRARIES |= {"math", "builtins", "tpcompile"}
_REFILLED = (list, dict, set, deque)
_CACHED = functools._lru_cache_wrapper


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
    functions: list[types.FunctionType] = []
    methods: list[tuple[type, str]] = []
    for module in model.modules():
        methods.append((type(module), "forward"))
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        held = filter(None, map(_function, (*hooks, *module.__dict__.values())))
        functions += [f for f in held if _belongs_to(f, type(module))]
    found: dict[tuple[int, str], Outer] = {}
    seen: set[tuple[type, str]] = set()
    while functions or methods:
        if methods and (method := methods.pop()) not in seen:
            seen.add(method)
            kind, name = method
            value = getattr(kind, name, None)
            if isinstance(value, _CACHED):
                found.setdefault((id(kind), name), Outer(f"{kind.__qualname__}.{name}", kind, name))
            if own := _own_functions(kind, name):
                functions += own.values()
                for parent in [*own][1:]:  # its own are attributes of modules
                    place = Outer(f"{parent.__qualname__}.{name}", parent, name)
                    found.setdefault((id(parent), name), place)
                named = {n for function in own.values() for n in _names(function)}
                methods += [(kind, n) for n in named if hasattr(kind, n) and not hasattr(nn.Module, n)]
            elif name != "forward" and _matters(value):
                place = Outer(f"{kind.__qualname__}.{name}", kind, name)
                found.setdefault((id(kind), name), place)
        while functions:
            function = functions.pop()
            if walked is not None:
                walked.append(function)
            methods += _methods(function)
            for place in _named(function):
                if found.setdefault((id(place.owner), place.key), place) is place:
                    inner = _function(place.look())
                    functions += [inner] if inner is not None and _belongs_to(inner, function) else []
    return list(found.values())


@contextmanager
def without_traced_results(places: Iterable[Outer]) -> Iterator[None]:
    """Empties the caches of functions (``functools.lru_cache``) that the block, a trace, has filled."""
    caches = [(value, value.cache_info().misses) for p in places if isinstance(value := p.look(), _CACHED)]
    try:
        yield
    finally:
        for cache, misses in caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()


@contextmanager
def unchanged_outside(
    model: nn.Module, walked: list[types.FunctionType] | None = None
) -> Iterator[list[Outer]]:
    """Puts back what the block changes outside of the model's modules.

    Args:
        model: the model.
        walked: is given the model's functions.

    Yields:
        The places that its functions name.

    Raises:
        CannotCapture: there is such a change, or an iterator; or random numbers are drawn.
    """
    before, places, drawn = [], outer_places(model, walked), _generators()
    seeded = torch.get_rng_state()
    for place in places:
        value = place.look()
        if is_iterator(value):
            refuse_iterator(place.name)
        copied: Any = type(value)(value) if type(value) in _REFILLED else None
        before.append((place, value, snapshot(value) if is_opaque(value) else copied, shot(value)))
    changed = []
    try:
        with without_traced_results(places):
            yield places
    finally:
        for place, value, copied, unchanged in before:
            if not unchanged(place.look()):
                changed.append(place.name)
                if place.look() is not value:
                    place.put(value)
                if is_opaque(value):
                    put_back(value, copied)
                elif copied is not None:
                    value.clear()
                    value.extend(copied) if isinstance(value, list | deque) else value.update(copied)
    if not torch.equal(torch.get_rng_state(), seeded):  # what is traced draws nothing by itself
        torch.set_rng_state(seeded)
        raise CannotCapture(
            "the model's forward seeds torch's random numbers, or draws some of constants",
            where="torch.manual_seed",
            todo="set the seed before the call; or keep what forward draws once in a buffer",
        )
    if (now := _generators()) != drawn:
        name = next(name for name in now if now[name] != drawn[name])
        raise CannotCapture(
            f"the model's forward draws random numbers of {name}, which would be the same at every call",
            where=name,
            todo="draw them with torch, or give them to the model as tensors",
        )
    if changed:
        raise CannotCapture(
            f"the model's forward changes {changed[0]}",
            where=changed[0],
            todo="keep what forward changes in attributes of the model, best in buffers",
        )


def _generators() -> dict[str, Any]:
    """Where the generators of random numbers are that python code uses."""
    _, numbers, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": (bytes(numbers), rest)}  # type: ignore[arg-type]


def _function(value: Any) -> types.FunctionType | None:
    """The python function in a method, a property, a partial call, or one that keeps its results."""
    wrapped = (types.MethodType, staticmethod, classmethod, property, functools.partial, _CACHED)
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

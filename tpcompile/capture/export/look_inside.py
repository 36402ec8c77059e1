"""Looks into python values: containers, objects, methods and partial calls."""

from __future__ import annotations

import functools
import gc
import sys
import types
import weakref
from collections import deque
from collections.abc import Collection, Iterator, MutableMapping, Sequence
from enum import Enum
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from .opaque_values import is_opaque

PLAIN = (type(None), bool, int, float, complex, str, bytes, Enum, range, slice, torch.dtype, torch.device)
OURS = "_tp"
"""How attributes of modules begin that are not the user's but ours."""

_CONTAINERS = (dict, list, tuple, set, deque)
_CLOSED = (nn.Module, Tensor, type, Enum, types.ModuleType, types.FunctionType)
VIEWS: tuple[type, ...] = (types.MappingProxyType, type({}.keys()), type({}.values()), type({}.items()))
_BOUND = (types.BuiltinMethodType, types.MethodWrapperType)
_LIBRARIES = frozenset({"torch", "numpy", "builtins", "logging", "threading", "typing"})
_HOLDERS = ("torch.distributions.", "torch.nn.attention.flex_attention", "torch.optim.")
"""Modules of libraries, by how their names begin, whose objects hold what they were given by their user."""


class Attributes(MutableMapping[str, Any]):
    """The attributes of an object that has slots, as a live table."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __getitem__(self, name: str) -> Any:
        try:
            return object.__getattribute__(self.owner, name)
        except AttributeError:
            raise KeyError(name) from None

    def __setitem__(self, name: str, value: Any) -> None:
        object.__setattr__(self.owner, name, value)

    def __delitem__(self, name: str) -> None:
        object.__delattr__(self.owner, name)

    def __iter__(self) -> Iterator[str]:
        kind: Any = type(self.owner)
        names = (*_slots(kind), *getattr(self.owner, "__dict__", ()))
        return (name for name in names if name in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@functools.lru_cache(1000)
def _slots(kind: type) -> tuple[str, ...]:
    tables = [vars(c) for c in kind.__mro__ if "__slots__" in vars(c)]
    return tuple(n for table in tables for n, v in table.items() if isinstance(v, types.MemberDescriptorType))


def module_of(frame: types.FrameType) -> str:
    """The name of the python module whose code a frame runs."""
    return str(frame.f_globals.get("__name__"))


def is_librarys(module: str, *more: str) -> bool:
    """Whether a python module, by its name, is part of a library that is not looked into, or of others."""
    root = module.partition(".")[0]
    return root in _LIBRARIES or root in more


def content(value: Any) -> Any:
    """The container of what is in a value: itself, the attributes of an object, or what it stands for.

    Methods, also python's own (``d.get``), stand for their objects; views, also of memory, and weak
    references for what they show.

    Returns:
        A list, tuple, set or table; None: the value is not looked into.
    """
    if isinstance(value, _CONTAINERS):
        return value
    if isinstance(value, _CLOSED) or is_opaque(value):
        return None
    if isinstance(value, types.MethodType):
        return content(value.__self__)
    if isinstance(value, VIEWS):
        return content(gc.get_referents(value)[0])
    if isinstance(value, (functools.partial, weakref.ReferenceType, memoryview, *_BOUND)):
        return _stands_for(value)
    kind: Any = type(value)
    if is_librarys(kind.__module__) and not kind.__module__.startswith(_HOLDERS):
        return None
    return _attributes(value)


def beside_items(value: Any) -> Any:
    """The attributes of a container whose class is derived from python's, as a table; None: it has none."""
    derived = isinstance(value, _CONTAINERS) and type(value).__module__ not in ("builtins", "collections")
    return _attributes(value) if derived else None


def _attributes(value: Any) -> Any:
    kind: Any = type(value)
    if _slots(kind):
        return Attributes(value)
    own = getattr(value, "__dict__", None)
    return own if type(own) is dict else None


def _stands_for(value: Any) -> tuple[Any, ...] | None:
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, weakref.ReferenceType):
        return (value(),)
    if isinstance(value, memoryview):
        return (value.obj,)
    owner = value.__self__
    return None if owner is None or isinstance(owner, types.ModuleType) else (owner,)


def same(one: Any, other: Any) -> bool:
    """Whether two values are one, or plain and equal; the type counts because 1 == 1.0 == True."""
    return one is other or (isinstance(one, PLAIN) and equal(one, other))


def equal(one: Any, other: Any) -> bool:
    """Whether two plain values are equal in all that a computation could tell; dynamo can trace it."""
    if type(one) is not type(other):
        return False
    if one != other:
        return bool(one != one and other != other)  # not a number
    return type(one) is not float or one != 0.0 or str(one) == str(other)  # with the sign of zeros


def first_unlike(leaves: Sequence[Any], example: Sequence[Any], numbers: Collection[int]) -> int | None:
    """The place of a call's first leaf of another type, rank or python value than an example's.

    Whether tensors are parameters is part of their type: python may ask. Dynamo can trace it.

    Args:
        leaves: the call, flat.
        example: as many leaves; the sizes and values of its tensors do not matter.
        numbers: the places of numbers that travel as sizes: of these too the value does not matter.
    """
    for at, (given, mine) in enumerate(zip(leaves, example, strict=True)):
        if at in numbers:
            like = type(given) is int and 0 <= given <= sys.maxsize  # as sizes are
        elif isinstance(given, Tensor) and isinstance(mine, Tensor):
            like = (given.dtype, given.ndim, given.layout) == (mine.dtype, mine.ndim, mine.layout)
            like = like and isinstance(given, nn.Parameter) == isinstance(mine, nn.Parameter)
            like = like and not given.is_nested  # it has no sizes to ask for
        else:
            like = equal(given, mine)
        if not like:
            return at
    return None


def without_values(leaves: Sequence[Any]) -> tuple[Any, ...]:
    """A call as an example of its kind: without the values of its tensors."""

    def valueless(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        meta = leaf.detach().to("meta")
        return nn.Parameter(meta, requires_grad=False) if isinstance(leaf, nn.Parameter) else meta

    return tuple(map(valueless, leaves))


def only_asks(code: Any) -> bool:
    """Whether all that a hook's code does is to ask for a gradient, as ``enable_input_require_grads`` does.

    It changes no value; it lets reentrant checkpointing give gradients behind weights that are frozen.
    """
    return isinstance(code, CodeType) and code.co_names == ("requires_grad_",) and not code.co_freevars

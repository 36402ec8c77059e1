"""What a model's python keeps from call to call: attributes of modules, containers and objects in them."""

from __future__ import annotations

import functools
import operator
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

MISSING: Any = object()
BOOKKEEPING = frozenset(nn.Module().__dict__) - {"training"}
"""What every module has and torch looks after; train and eval mode are the user's."""

Step = tuple[str, Any]
"""From a value into it: ``("attribute", name)`` or ``("item", key)``."""

PLAIN = (type(None), bool, int, float, complex, str, bytes, Enum, range, slice, torch.dtype, torch.device)
_CONTAINERS = (dict, list, tuple, set, deque)
_CLOSED = (
    *(nn.Module, Tensor, type, Enum, functools.partial, weakref.ReferenceType, types.ModuleType),
    *(types.FunctionType, types.MethodType, types.BuiltinFunctionType),
)
_LIBRARIES = frozenset({"torch", "numpy", "builtins", "logging", "threading", "typing"})
_DEEPEST, _LARGEST = 5, 10_000

Shot = Callable[[Any], bool]
"""Whether a value is still what it was."""


def is_ours(name: str) -> bool:
    """Whether an attribute of a module is torch's or ours, not its own."""
    return name in BOOKKEEPING or name.startswith("_tp") or name == "_compiled_call_impl"


def content(value: Any) -> Any:
    """The container of what is in a value: itself, or an object's attributes; None: it is not looked into."""
    if isinstance(value, _CONTAINERS):
        return value
    if isinstance(value, _CLOSED) or type(value).__module__.partition(".")[0] in _LIBRARIES:
        return None
    own = getattr(value, "__dict__", None)
    return own if type(own) is dict else None


def same(one: Any, other: Any) -> bool:
    """Whether two values are one, or plain and equal; the type counts because 1 == 1.0 == True."""
    return one is other or (isinstance(one, PLAIN) and type(one) is type(other) and bool(one == other))


def shot(value: Any, baked: frozenset[int] | None = None, depth: int = 0) -> Shot:
    """A function that tells whether a value is the same, by content where it is a container or an object.

    Args:
        value: the value.
        baked: the storages of tensors whose values matter (``storage``), of others only the form does;
            None: all matter.
        depth: how deep it is in others.
    """
    inside = content(value)
    if isinstance(value, Tensor):
        if baked is not None and storage(value) not in baked:
            return form_shot(value)
        version = _version(value)
        return lambda now: now is value and _version(now) == version
    if inside is None or depth > _DEEPEST:
        return lambda now: same(now, value)
    kind = type(value)
    if isinstance(inside, dict):
        plain = {k: v for k, v in inside.items() if isinstance(v, PLAIN)}
        deep = [(k, shot(v, baked, depth + 1)) for k, v in inside.items() if not isinstance(v, PLAIN)]
        return lambda now: type(now) is kind and _same_dict(content(now), plain, deep)
    if isinstance(inside, set):
        items = frozenset(inside)
        return lambda now: type(now) is kind and now == items
    shots = [shot(v, baked, depth + 1) for v in inside]
    return lambda now: type(now) is kind and len(now) == len(shots) and all(map(_call, shots, now))


def form_shot(tensor: Tensor) -> Shot:
    """For a tensor whose value a program does not have in it: whether another has the same form."""

    def form(t: Tensor) -> tuple[Any, ...]:
        return type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad

    expected = form(tensor)
    return lambda now: isinstance(now, Tensor) and form(now) == expected


def storage(tensor: Tensor) -> int:
    """What tells a tensor's memory from that of others, as long as it lives."""
    return tensor.untyped_storage()._cdata


def _same_dict(now: dict[Any, Any], plain: dict[Any, Any], deep: list[tuple[Any, Shot]]) -> bool:
    if len(now) != len(plain) + len(deep):
        return False
    found = [dict.get(now, key, MISSING) for key in plain]
    if not all(map(operator.is_, found, plain.values())) and not all(map(same, found, plain.values())):
        return False
    return all(shot(dict.get(now, key, MISSING)) for key, shot in deep)


def _call(shot: Shot, now: Any) -> bool:
    return shot(now)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class Change:
    """A value that forward has changed.

    Attributes:
        path: the module's path.
        steps: from the module to the container that has changed.
        key: of the value in it; of a list, how many of its items are as they were.
        value: the new value; of a list, all behind these; ``MISSING`` if it is gone.
        old: the value before, of a dict's or an object's.
    """

    path: str
    steps: tuple[Step, ...]
    key: Any
    value: Any
    old: Any = MISSING

    def __str__(self) -> str:
        names = [str(key) if kind == "attribute" else f"[{key!r}]" for kind, key in self.steps]
        last = [] if self.steps and not isinstance(self.key, str) else [str(self.key)]
        return ".".join(filter(None, [self.path, *names, *last])).replace(".[", "[")


@dataclass(frozen=True)
class _Table:
    path: str
    steps: tuple[Step, ...]
    live: Any
    before: Any


class PythonState:
    """A model's python state as it is now, to compare with and to return to."""

    def __init__(self, model: nn.Module) -> None:
        self._tables: list[_Table] = []
        self._known: dict[int, Any] = {}  # kept alive, so that no other object gets its id
        for path, module in model.named_modules():
            self._add(path, (), module.__dict__)

    def _add(self, path: str, steps: tuple[Step, ...], live: Any, kind: str = "attribute") -> None:
        if id(live) in self._known or len(live) > _LARGEST:
            return
        self._known[id(live)] = live
        items = dict(live) if isinstance(live, dict) else set(live) if isinstance(live, set) else list(live)
        self._tables.append(_Table(path, steps, live, items))
        for key, value in items.items() if isinstance(items, dict) else enumerate(items):
            inside = content(value)
            if inside is not value:
                self._known.setdefault(id(value), value)
            if inside is not None and len(steps) < _DEEPEST:
                self._add(path, (*steps, (kind, key)), inside, "item" if inside is value else "attribute")

    def knows(self, value: Any) -> bool:
        """Whether a value was somewhere in the state."""
        return self._known.get(id(value)) is value

    def restore(self) -> None:
        """Puts everything back."""
        for table in self._tables:
            live, before = table.live, table.before
            if isinstance(live, tuple) or _same_items(live, before):
                continue
            if isinstance(live, dict) and before.keys() <= live.keys():
                for key in live.keys() - before.keys():
                    del live[key]
                live.update(before)
                continue
            live.clear()
            live.extend(before) if isinstance(live, list | deque) else live.update(before)

    def changes(self) -> Iterator[Change]:
        """What has changed since; parameters, buffers, modules and hooks under their tables' names."""
        for table in self._tables:
            live, before = table.live, table.before
            if isinstance(live, tuple) or _same_items(live, before):
                continue
            if isinstance(live, dict):
                for key in [*before, *(key for key in live if key not in before)]:
                    old, new = dict.get(before, key, MISSING), dict.get(live, key, MISSING)
                    if not same(old, new) and (table.steps or not is_ours(key)):
                        yield Change(table.path, table.steps, key, new, old)
            elif isinstance(live, list | deque):
                pairs = zip(before, live, strict=False)
                kept = next(
                    (i for i, pair in enumerate(pairs) if not same(*pair)), min(len(before), len(live))
                )
                yield Change(table.path, table.steps, kept, list(live)[kept:])
            else:
                yield Change(table.path, table.steps, None, live)


def _same_items(one: Any, other: Any) -> bool:
    if len(one) != len(other):
        return False
    if isinstance(one, set):
        return bool(one == other)
    if isinstance(one, dict):
        return all(same(dict.get(one, key, MISSING), value) for key, value in other.items())
    return all(map(same, one, other))


def table_at(model: nn.Module, path: str, steps: tuple[Step, ...]) -> Any:
    """The container at a place of a model."""
    table: Any = model.get_submodule(path).__dict__
    for _, key in steps:
        table = content(table[key])
    return table


@contextmanager
def recorded_reads(model: nn.Module) -> Iterator[set[tuple[str, str]]]:
    """Notes which attributes of the model's modules are read in the block.

    Yields:
        Paths and names; also of attributes that are not there, or that a module's class has.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    found: set[tuple[int, str]] = set()
    reads: set[tuple[str, str]] = set()

    def look_up(module: nn.Module, name: str) -> Any:
        found.add((id(module), name))
        return object.__getattribute__(module, name)

    with patch.object(nn.Module, "__getattribute__", look_up, create=True):
        yield reads
    reads |= {(paths[key], name) for key, name in found if key in paths and not is_ours(name)}

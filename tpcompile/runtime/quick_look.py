"""A quick look at python state: if every object is where it was, nothing has to be compared."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import attrgetter, call, is_, itemgetter
from threading import local
from typing import Any
from weakref import ReferenceType

from torch import Tensor

from tpcompile.capture.export.look_inside import PLAIN, Attributes, beside_items, content
from tpcompile.capture.export.opaque_values import is_opaque
from tpcompile.capture.export.shots import MISSING, is_small, shot, tensor_version
from tpcompile.ir.torch_internals import dict_version

_END = object()
_COMPARED = (set, Attributes)
_BUILT_IN = (dict, list, tuple, deque)
Baked = frozenset[int] | None


@dataclass
class _Looks:
    """What is found at places, one object each or several."""

    many: list[Callable[[], Iterable[Any]]] = field(default_factory=list)
    found: list[Any] = field(default_factory=list)
    one: list[Callable[[], Any]] = field(default_factory=list)
    found_one: list[Any] = field(default_factory=list)
    named: dict[str, tuple[list[Any], list[Any]]] = field(default_factory=dict)

    def all(self, look: Callable[[], Iterable[Any]]) -> None:
        """Adds a look at several objects."""
        self.many.append(look)
        self.found += look()

    def single(self, look: Callable[[], Any]) -> None:
        """Adds a look at one object."""
        self.one.append(look)
        self.found_one.append(look())

    def attribute(self, owner: Any, name: str) -> None:
        """Adds a look at one attribute; all of one name are a single loop in C."""
        owners, found = self.named.setdefault(name, ([], []))
        owners.append(owner)
        found.append(getattr(owner, name))

    def same(self) -> bool:
        """Whether everything is where it was; after the last place, ``_END`` tells if containers grow."""
        try:
            for name, (owners, found) in self.named.items():
                if not all(map(is_, map(attrgetter(name), owners), found)):
                    return False
            return all(
                map(is_, chain.from_iterable(map(call, self.many)), self.found),
            ) and all(map(is_, map(call, self.one), self.found_one))
        except (KeyError, AttributeError, ValueError):  # gone
            return False


class QuickLook:
    """The objects that are at certain places and in all that is there, as they are when this is made.

    It says of a later moment that all of them are the same and none was written to, or that it cannot tell:
    then values have to be compared. Whatever runs for each of them is C code. Of a table first its version is
    asked, which every write to it changes.
    """

    def __init__(self) -> None:
        self._tables, self._others = _Looks(), _Looks()
        self._versioned: list[dict[Any, Any]] = []
        self._tensors: list[Tensor] = []
        self._slow: list[Callable[[], bool]] = []
        self._seen: dict[tuple[int, Baked], Any] = {}  # kept alive, so that ids stay theirs

    def table(self, table: dict[str, Any], names: Iterable[str], baked: Baked = None) -> None:
        """Looks at some keys of a table, and into what is there; ``baked`` is that of ``shot``."""
        names = list(names)
        present = [name for name in names if name in table]
        self._versioned.append(table)
        if absent := frozenset(names) - {*present}:
            self._tables.single(partial(table.keys().isdisjoint, absent))
        if present:
            self._tables.all(partial(itemgetter(*present, present[0]), table))  # of one key comes no tuple
            for name in present:
                self._into(table[name], baked)

    def attributes(self, owner: Any, names: Iterable[str]) -> None:
        """Looks at attributes of a class, a function or a cell, and into what is there."""
        present = [name for name in names if getattr(owner, name, MISSING) is not MISSING]
        for name in {*names} - {*present}:
            self._others.single(partial(getattr, owner, name, MISSING))
        if len(present) == 1:
            self._others.attribute(owner, present[0])
        elif present:
            self._others.all(partial(attrgetter(*present), owner))
        for name in present:
            self._into(getattr(owner, name), None)

    def slow(self, look: Callable[[], bool]) -> None:
        """Adds what can only be found out by comparing."""
        self._slow.append(look)

    def finished(self) -> QuickLook:
        """The same, after the last place."""
        self._tables.all(lambda: (_END,))
        self._others.all(lambda: (_END,))
        self._tensor_versions = list(map(tensor_version, self._tensors))
        self._table_versions = list(map(dict_version, self._versioned))
        return self

    def same(self) -> bool:
        """Whether everything is as it was, for sure."""
        versions = list(map(dict_version, self._versioned))
        if versions != self._table_versions:
            if not self._tables.same():
                return False
            self._table_versions = versions
        return (
            self._others.same()
            and list(map(tensor_version, self._tensors)) == self._tensor_versions
            and all(map(call, self._slow))
        )

    def _into(self, value: Any, baked: Baked) -> None:
        """Follows ``shot``: what that compares is looked at here."""
        if isinstance(value, PLAIN) or (id(value), baked) in self._seen:
            return
        self._seen[id(value), baked] = value
        inside = content(value)
        if isinstance(value, Tensor) and baked is None and not is_small(value):
            self._tensors.append(value)
        elif isinstance(value, (Tensor, ReferenceType)) or is_opaque(value) or isinstance(inside, _COMPARED):
            self._slow.append(partial(shot(value, baked), value))
        elif isinstance(value, types.MethodType):
            self._into(value.__self__, baked)
        elif inside is not None:
            self._container(value, inside, baked)
        if isinstance(beside := beside_items(value), Attributes):
            self._slow.append(partial(shot(value, baked), value))
        elif beside is not None:
            self._table(partial(object.__getattribute__, value, "__dict__"), beside, baked)

    def _container(self, value: Any, inside: Any, baked: Baked) -> None:
        if type(value) not in _BUILT_IN:  # which no object stops being
            self._others.single(partial(type, value))
        if isinstance(inside, dict):
            is_own = inside is getattr(value, "__dict__", None)
            find = partial(object.__getattribute__, value, "__dict__") if is_own else None
            self._table(partial(content, value) if isinstance(value, local) else find, inside, baked)
            return
        if inside is value and not isinstance(value, tuple):
            self._others.all(partial(tuple, inside))
        for each in inside:
            self._into(each, baked)

    def _table(self, find: Callable[[], Any] | None, table: dict[Any, Any], baked: Baked) -> None:
        if find is not None:
            self._others.single(find)
        self._versioned.append(table)
        self._tables.all(partial(tuple, table))
        self._tables.all(partial(tuple, items := table.values()))
        for each in items:
            self._into(each, baked)

"""What selects a program beyond its call: all that python has read while it was captured, and weights' types.

A trace of the model's python has baked in what it has read. So a program serves as long as all of that is as
it was: attributes of modules, whatever their names, with the containers and objects in them, and what their
classes say. When something changes, another program is captured; when it changes back, the first one serves.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from inspect import getattr_static
from itertools import starmap
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tpcompile.capture.export.captured import Captured
from tpcompile.capture.export.look_inside import PLAIN, content, same
from tpcompile.capture.export.opaque_values import is_opaque
from tpcompile.capture.export.outer_places import Outer
from tpcompile.capture.export.shots import MISSING, Shot, form_shot, shot, storage

from .quick_look import QuickLook
from .replaced_forward import LIFTED

Function = TypeVar("Function", bound=Callable[..., Any])


class Settings:
    """What the modules of a sharded model report.

    Attributes:
        types: a number for the types of all weights; equal types have equal numbers.
        state: the same for attributes that programs have read. Compiled code is guarded by it, instead of by
            hundreds of values.
        read: the paths and names of these attributes.
    """

    def __init__(self, types: int = 0) -> None:
        self.types = types
        self.state = 0
        self.read: set[tuple[str, str]] = set()
        self._objects: list[Any] = []  # kept alive, so that no other object gets its id

    def report(self, path: str, name: str, old: Any, new: Any) -> None:
        """Notes that an attribute of the module at ``path`` has changed.

        The number is a sum (exclusive or) of what all attributes contribute, so that it costs the same for
        any number of them.
        """
        if (path, name) in self.read and old is not new:
            self.state ^= hash((path, name, self._token(old))) ^ hash((path, name, self._token(new)))

    def find_types(self, model: nn.Module) -> None:
        """Finds out the types of all weights."""
        self.types = 0
        for path, module in model.named_modules():
            self.types ^= hash((path, types_of(module)))

    def report_types(self, path: str, old: Any, new: Any) -> None:
        """Notes that the weights of the module at ``path`` have other types."""
        self.types ^= hash((path, old)) ^ hash((path, new))

    def _token(self, value: Any) -> Any:
        if isinstance(value, PLAIN) and value.__hash__ is not None:
            return type(value).__name__, value  # the type because 1 == 1.0 == True
        self._objects.append(value)
        return id(value)


def found_out_once(function: Function) -> Function:
    """As ``torch.compiler.assume_constant_result``, without loading dynamo for whoever does not need it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class Reads:
    """What the trace of a program has read of a model's modules, and whether it is as it was.

    Args:
        model: the model, in the state in which the program was captured.
        captured: the program.
        original: gives the original class of a module, by its path.
    """

    def __init__(
        self, model: nn.Module, captured: Captured, original: Callable[[str], type[nn.Module]]
    ) -> None:
        self._baked = None if captured.baked is None else frozenset(map(storage, captured.baked))
        fed = {spec.name for spec in captured.inputs if spec.kind == "attribute"}
        plain: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._deep: list[tuple[dict[str, Any], str, Shot, bool]] = []
        self._shots: dict[int, tuple[Any, Shot]] = {}
        classes: dict[tuple[type, str], None] = {}  # in order
        for path, name in sorted(captured.reads):
            module = model.get_submodule(path)
            own: dict[str, Any] = module.__dict__
            if any(name in own[table] for table in ("_parameters", "_buffers", "_modules")):
                continue
            values = plain.setdefault(id(own), (own, {}))[1]
            if name == "forward" and path:
                values[LIFTED] = own.get(LIFTED, MISSING)
            if name != "forward" or path:
                self._note(own, name, values, f"{path}.{name}".lstrip("."), fed)
            kind = original(path)
            if name not in own and _is_models(kind, name):
                classes[kind, name] = None
        self._plain = [_Values(own, values) for own, values in plain.values() if values]
        self._classes = [_class_shot(kind, name) for kind, name in classes]
        self._outer = [(place, shot(place.look(), name=place.name)) for place in captured.outer]
        self._quick: QuickLook | None = None

    def _note(
        self, own: dict[str, Any], name: str, values: dict[str, Any], place: str, every_fed: set[str]
    ) -> None:
        value, fed = own.get(name, MISSING), place in every_fed
        if isinstance(value, Tensor) or is_opaque(value) or content(value) is not None:
            if id(value) not in self._shots:
                taken = form_shot(value) if fed else shot(value, self._baked, place)
                self._shots[id(value)] = value, taken
            self._deep.append((own, name, self._shots[id(value)][1], fed))
        else:
            values[name] = value

    def hold(self, state: int) -> bool:
        """Whether all is as it was; while dynamo traces, it is found out once for each ``Settings.state``."""
        return self._hold_now(state) if torch.compiler.is_dynamo_compiling() else self._hold()

    @found_out_once
    def _hold_now(self, state: int) -> bool:
        return self._hold()

    def _hold(self) -> bool:
        if self._quick is not None and self._quick.same():
            return True
        held = self._hold_by_value()
        self._quick = self._look() if held else None
        return held

    def _look(self) -> QuickLook:
        """What is there now, and need not be compared as long as it is."""
        look = QuickLook()
        for values in self._plain:
            look.table(values.table, values.names)
        for table, name, unchanged, fed in self._deep:
            if fed:
                look.slow(partial(_unchanged_at, table, name, unchanged))
            else:
                look.table(table, [name], self._baked)
        owners: dict[int, tuple[Any, list[str]]] = {}
        for find, kind, name, unchanged in self._classes:
            if find is getattr_static:
                look.slow(partial(_unchanged_attribute, find, kind, name, unchanged))
            else:
                owners.setdefault(id(kind), (kind, []))[1].append(name)
        for place, unchanged in self._outer:
            bound = isinstance(place.owner, type) and isinstance(place.look(), classmethod)
            if bound or place.owner is os.environ or isinstance(place.owner, ContextVar):
                look.slow(partial(_unchanged_place, place, unchanged))
            else:
                owners.setdefault(id(place.owner), (place.owner, []))[1].append(place.key)
        for owner, names in owners.values():
            (look.table if isinstance(owner, dict) else look.attributes)(owner, names)
        return look.finished()

    def _hold_by_value(self) -> bool:
        if not all(values.hold() for values in self._plain):
            return False
        looked: set[tuple[int, int]] = set()  # a configuration is an attribute of many modules
        for table, name, unchanged, _ in self._deep:
            now = table.get(name, MISSING)
            if (id(now), id(unchanged)) not in looked:
                looked.add((id(now), id(unchanged)))
                if not unchanged(now):
                    return False
        if not all(starmap(_unchanged_attribute, self._classes)):
            return False
        return all(unchanged(place.look()) for place, unchanged in self._outer)


class _Values:
    """Values of one table that are compared as they are; fast where they are the same objects."""

    def __init__(self, table: dict[str, Any], values: dict[str, Any]) -> None:
        self.table, self.names = table, tuple(values)
        self._absent = frozenset(name for name, value in values.items() if value is MISSING)
        present = {name: value for name, value in values.items() if value is not MISSING}
        self._get = operator.itemgetter(*present, *present) if present else lambda _: ()
        self._values = (*present.values(), *present.values())  # twice, as of a single name no tuple comes

    def hold(self) -> bool:
        try:
            found = self._get(self.table)
        except KeyError:
            return False
        same_ones = all(map(operator.is_, found, self._values)) or all(map(same, found, self._values))
        return same_ones and self.table.keys().isdisjoint(self._absent)


def _unchanged_at(table: dict[str, Any], name: str, unchanged: Shot) -> bool:
    return unchanged(table.get(name, MISSING))


def _unchanged_attribute(find: Callable[..., Any], owner: Any, name: str, unchanged: Shot) -> bool:
    return unchanged(find(owner, name, MISSING))


def _unchanged_place(place: Outer, unchanged: Shot) -> bool:
    return unchanged(place.look())


def types_of(module: nn.Module) -> tuple[Any, ...]:
    """The types and devices of a module's own weights."""
    own = [*module._parameters.values(), *module._buffers.values()]
    return tuple(None if t is None else (t.dtype, t.device) for t in own)


def _class_shot(kind: type, name: str) -> tuple[Callable[..., Any], type, str, Shot]:
    """How to find what a class says, where, and whether it is the same (see ``_unchanged_attribute``).

    Class methods, and a class's ``__dict__``, are other objects each time they are asked for: what makes them
    is compared instead.
    """
    value = getattr(kind, name)
    if getattr(kind, name) is value:
        return getattr, kind, name, shot(value, name=f"{kind.__qualname__}.{name}")
    return getattr_static, kind, name, partial(operator.is_, getattr_static(kind, name))


def _is_models(kind: type, name: str) -> bool:
    """Whether a class's attribute is the model's own code or data, or any forward."""
    owner = next((c for c in kind.__mro__ if name in c.__dict__), None)
    return owner is not None and (name == "forward" or owner.__module__.partition(".")[0] != "torch")

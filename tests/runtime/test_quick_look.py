"""A quick look at python state notices all that comparing notices, and compares as little as it can."""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
import torch

from tpcompile.capture.export.shots import DEEPEST, shot
from tpcompile.errors import CannotCapture
from tpcompile.runtime.quick_look import QuickLook


class Thing:
    """An object with attributes, a class's data, and a method."""

    data = "class"

    def __init__(self) -> None:
        self.number, self.items = 3, [1, [2]]

    def method(self) -> None:
        """Nothing."""


class Slots:
    """An object without a table."""

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 1


class Named(dict[str, int]):
    """A dict that has attributes, too."""

    size = 1


LOCAL = threading.local()


def around() -> Callable[[], Any]:
    """A function with a cell."""
    items = [1]
    return lambda: items


def state() -> dict[str, Any]:
    """Everything that a module may keep."""
    thing, LOCAL.number = Thing(), 3
    named = Named(a=1)
    named.size = 2
    held, loop = {"a": 1}, list[Any]()
    loop.append((loop, thing))
    return {
        "number": 1000,
        "text": "a",
        "dict": {"a": 1, "b": {"c": [1, 2]}},
        "list": [1, (2, [3])],
        "deque": deque([1, 2]),
        "set": {1, 2},
        "tensor": torch.zeros(2),
        "thing": thing,
        "method": Thing().method,
        "partial": functools.partial(print, [1], end={"a": 1}),
        "slots": Slots(),
        "views": (held.values(), held.items(), MappingProxyType(held)),
        "bound": [held.get],
        "memory": memoryview(bytearray(1)),
        "weak": [weakref.ref(thing)],
        "local": LOCAL,
        "named": named,
        "loop": loop,
        "last": [1],
    }


CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another number": lambda s: s.update(number=1001),
    "a number of another type": lambda s: s["dict"].update(a=True),
    "gone": lambda s: s.pop("text"),
    "comes": lambda s: s.update(absent=1),
    "a key": lambda s: s["dict"]["b"].update(d=1),
    "another key": lambda s: s["dict"].update(z=s["dict"].pop("b")),
    "another order": lambda s: s["dict"].update(a=s["dict"].pop("a")),
    "an item deep down": lambda s: s["dict"]["b"]["c"].append(3),
    "in a tuple": lambda s: s["list"][1][1].append(4),
    "fewer": lambda s: s["list"].pop(),
    "of a deque": lambda s: s["deque"].rotate(1),
    "of a set": lambda s: s["set"].add(3),
    "a tensor's value": lambda s: s["tensor"].add_(1),
    "another tensor": lambda s: s.update(tensor=torch.zeros(2)),
    "of an object": lambda s: setattr(s["thing"], "number", 4),
    "deep in an object": lambda s: s["thing"].items[1].append(4),
    "an object's table": lambda s: setattr(s["thing"], "__dict__", {"number": 3, "items": [1, [3]]}),
    "an object's class": lambda s: setattr(s["thing"], "__class__", type("Other", (Thing,), {})),
    "of a method's object": lambda s: setattr(s["method"].__self__, "number", 4),
    "an argument of a partial call": lambda s: s["partial"].args[0].append(2),
    "a keyword of a partial call": lambda s: s["partial"].keywords["end"].update(a=2),
    "a slot": lambda s: setattr(s["slots"], "number", 2),
    "of a view": lambda s: s["bound"][0].__self__.update(a=2),
    "of memory": lambda s: s["memory"].obj.__setitem__(0, 1),
    "behind a weak reference": lambda s: setattr(s["weak"][0](), "number", 4),
    "of this thread": lambda s: setattr(LOCAL, "number", 4),
    "an attribute of a dict": lambda s: setattr(s["named"], "size", 3),
    "an item of one with attributes": lambda s: s["named"].update(a=2),
    "in itself": lambda s: s["loop"][0][0].append(1),
    "grows at the end": lambda s: s["last"].append(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str) -> None:
    table = state()
    look, unchanged = QuickLook(), {name: shot(value) for name, value in table.items()}
    look.table(table, [*table, "absent"])
    assert look.finished().same() and all(unchanged[name](table[name]) for name in table)
    CHANGES[change](table)
    assert not look.same()
    assert set(table) != set(unchanged) or not all(unchanged[name](table[name]) for name in table)


def test_what_a_weak_reference_refers_to_may_go() -> None:
    thing, look = Thing(), QuickLook()
    table = {"weak": weakref.ref(thing)}
    unchanged = shot(table)
    look.table(table, table)
    assert look.finished().same() and unchanged(table)
    del thing
    assert table["weak"]() is None
    assert not look.same() and not unchanged(table)


def test_what_is_at_two_places_stays_one_object() -> None:
    shared = [1]
    value = {"a": shared, "b": shared}
    unchanged = shot(value)
    value["a"] = [1]
    assert not unchanged(value)  # else nobody would look into what is at the second place
    value["a"] = shared
    assert unchanged(value)


def test_what_is_too_deep_to_compare_is_refused() -> None:
    value: list[Any] = [1]
    for _ in range(DEEPEST):
        value = [value]
    assert shot(value)(copy.deepcopy(value))
    with pytest.raises(CannotCapture, match=f"the table holds values that are more than {DEEPEST} deep"):
        shot([value], name="the table")


def test_attributes_outside_of_tables() -> None:
    function, kind = around(), type("Kind", (Thing,), {})
    for owner, name, change in (
        (kind, "data", lambda: setattr(kind, "data", "own")),
        (kind, "none", lambda: setattr(kind, "none", 1)),
        (function.__closure__[0], "cell_contents", lambda: function().append(2)),
    ):
        look = QuickLook()
        look.attributes(owner, [name])
        assert look.finished().same()
        change()
        assert not look.same()


def test_what_is_compared_is_compared_each_time() -> None:
    value, look = [1], QuickLook()
    look.slow(functools.partial(shot(value), value))
    assert look.finished().same()
    value.append(2)
    assert not look.same()


def test_only_the_form_of_a_tensor_whose_value_is_not_in_the_program() -> None:
    table, look = {"tensor": torch.zeros(2), "list": [torch.zeros(2)]}, QuickLook()
    look.table(table, table, frozenset())
    look.finished()
    table["tensor"].add_(1)
    table["list"][0].add_(1)
    assert look.same()
    table["list"][0].resize_(1)
    assert not look.same()


def test_what_is_put_back_is_as_it_was() -> None:
    table, number = state(), 1000
    table["number"] = number
    look = QuickLook()
    look.table(table, table)
    look.finished()
    table["number"] = 3
    assert not look.same()
    table["number"] = number
    assert look.same() and look.same()

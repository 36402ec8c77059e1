"""A quick look at python state notices all that comparing notices, and compares as little as it can."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tpcompile.capture.export.python_state import shot
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


def around() -> Callable[[], Any]:
    """A function with a cell."""
    items = [1]
    return lambda: items


def state() -> dict[str, Any]:
    """Everything that a module may keep."""
    thing = Thing()
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
    "grows at the end": lambda s: s["last"].append(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str) -> None:
    table = state()
    look = QuickLook()
    look.table(table, [*table, "absent"])
    assert look.finished().same()
    CHANGES[change](table)
    assert not look.same()


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

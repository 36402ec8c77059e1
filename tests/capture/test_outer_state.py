"""What functions name outside of a model is found, so that another value of it is another program."""

from __future__ import annotations

import importlib
import random
import secrets
import sys
from contextvars import ContextVar
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from tpcompile.capture.export.capture_model import capture
from tpcompile.capture.export.named_places import outer_places
from tpcompile.capture.export.shots import shot
from tpcompile.capture.repeats.capture_repeated import capture_repeated
from tpcompile.errors import CannotCapture
from tpcompile.ir.calls import bind_call
from tpcompile.runtime.settings import Reads

FACTOR, TABLE, BASE = torch.tensor(2.0), np.ones(3), 2.0
settings, nested = ModuleType("settings_of_a_model"), ModuleType("settings_of_a_model.nested")
settings.nested, settings.SCALE, nested.DEPTH = nested, 2.0, 3
exec("SHIFT = 1.0\ndef shifted(x):\n    return x + SHIFT", vars(settings))


class Choices:
    """Numbers in a class, as configurations are written."""

    width = 3


class Wide(Choices):
    """Inherits them."""


class Parent(nn.Module):
    """Names what its child does not."""

    limits = torch.ones(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x) * BASE

    def scale(self, x: Tensor) -> Tensor:
        return x * FACTOR


class Child(Parent):
    """Names everything else."""

    def forward(self, x: Tensor) -> Tensor:
        x = settings.shifted(super().forward(x)) * settings.SCALE * settings.nested.DEPTH
        return x * float(TABLE[0]) * Wide.width * self.limits

    def scale(self, x: Tensor) -> Tensor:
        return super().scale(x)


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (settings, "SHIFT", 2.0),
        (settings, "shifted", torch.sin),
        (settings, "SCALE", 3.0),
        (nested, "DEPTH", 4),
        (Choices, "width", 4),
        (f"{__name__}", "BASE", 3.0),
        (f"{__name__}", "FACTOR", torch.tensor(3.0)),
        (f"{__name__}", "TABLE", np.zeros(3)),
        (Parent, "scale", torch.sin),
    ],
)
def test_another_value_is_noticed(owner: Any, name: str, value: Any) -> None:
    noted = [(place, shot(place.look())) for place in outer_places(Child())]
    assert all(unchanged(place.look()) for place, unchanged in noted)
    with patch(f"{owner}.{name}", value) if isinstance(owner, str) else patch.object(owner, name, value):
        assert not all(unchanged(place.look()) for place, unchanged in noted)
    assert all(unchanged(place.look()) for place, unchanged in noted)


def test_tensors_and_lists_of_classes_are_compared() -> None:
    model = Child()
    captured = capture(model, bind_call(model, (torch.ones(3, 2),), {}))
    reads = Reads(model, captured, lambda path: type(model.get_submodule(path)))
    assert reads.hold(0)
    with patch.object(Parent, "limits", torch.ones(2)):
        assert not reads.hold(0)
    Parent.limits.add_(1)
    assert not reads.hold(0)


class Mixin:
    """Comes before ``nn.Module``, as PEFT's: what an object's table is follows from it."""

    @classmethod
    def half(cls, x: Tensor) -> Tensor:
        return x / 2


class Mixed(Mixin, nn.Module):
    """Asks for its own table, which is another object each time that the class is asked for it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.half(x) if "training" in self.__dict__ else x


def test_what_a_class_makes_anew_each_time_is_not_another_thing() -> None:
    """A program would be captured at every call."""
    model = Mixed()
    captured = capture(model, bind_call(model, (torch.ones(3, 2),), {}))
    assert {("", "half"), ("", "__dict__")} <= captured.reads
    reads = Reads(model, captured, lambda path: type(model.get_submodule(path)))
    assert reads.hold(0) and reads.hold(0)
    with patch.object(Mixin, "half", classmethod(lambda cls, x: x)):
        assert not reads.hold(0)
    assert reads.hold(0)
    with patch.object(Mixed, "half", classmethod(lambda cls, x: x)):
        assert not reads.hold(0)


def test_arrays_are_compared_by_what_is_in_them() -> None:
    model = Child()
    model.numbers = np.ones(2)
    captured = capture(model, bind_call(model, (torch.ones(3, 2),), {}))
    captured.reads |= {("", "numbers")}
    reads = Reads(model, captured, lambda path: type(model.get_submodule(path)))
    for array in (TABLE, model.numbers):
        assert reads.hold(0)
        assert reads.hold(0)
        array += 1
        assert not reads.hold(0)
        array -= 1


SCALE = 2.0


class Helper:
    """No module: an object that a model holds."""

    factor = 3.0

    def scaled(self, x: Tensor) -> Tensor:
        return x * SCALE

    @property
    def scale(self) -> float:
        return SCALE

    @classmethod
    def of_class(cls, x: Tensor) -> Tensor:
        return x * cls.factor

    def __enter__(self) -> float:
        return SCALE

    def __exit__(self, *args: Any) -> None:
        pass

    def __len__(self) -> int:
        return int(SCALE)

    def unused(self) -> float:
        return BASE


def _entered(model: nn.Module, x: Tensor) -> Tensor:
    with model.helper as scale:
        return x * scale


class Holding(nn.Module):
    """Holds objects, modules out of sight, and tensors."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.helper, self.listed, self.act = Helper(), {"helpers": [Helper()]}, act
        self.hidden = [nn.Linear(2, 2).requires_grad_(False), nn.Dropout(0.5)]
        self.many, self.large = [torch.ones(2)], [torch.ones(100, 2)]

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self, x)


@pytest.mark.parametrize(
    ("act", "owner", "name", "value"),
    [
        (lambda m, x: m.helper.scaled(x), __name__, "SCALE", 3.0),
        (lambda m, x: x * m.helper.scale, __name__, "SCALE", 3.0),
        (lambda m, x: m.listed["helpers"][0].scaled(x), __name__, "SCALE", 3.0),
        (lambda m, x: x * len(m.helper), __name__, "SCALE", 3.0),
        (_entered, __name__, "SCALE", 3.0),
        (lambda m, x: m.helper.of_class(x), Helper, "factor", 4.0),
        (lambda m, x: m.helper.scaled(x), Helper, "scaled", lambda helper, x: x),
    ],
)
def test_what_the_methods_of_objects_name_is_noticed(act: Any, owner: Any, name: str, value: Any) -> None:
    model = Holding(act)
    captured = capture(model, bind_call(model, (torch.ones(3, 2),), {}))
    reads = Reads(model, captured, lambda path: type(model.get_submodule(path)))
    assert reads.hold(0)
    with patch(f"{owner}.{name}", value) if isinstance(owner, str) else patch.object(owner, name, value):
        assert not reads.hold(0)
    with patch(f"{__name__}.BASE", 7.0):  # of a method that nobody calls
        assert reads.hold(0)


class Model:
    """A class in a class, as configurations are written."""

    depth = 2


class Config:
    """Numbers that nobody makes an object of."""

    width, model = 3, Model

    @staticmethod
    def scale() -> float:
        return SCALE


class Table(dict[str, int]):
    """Has data beside its items."""

    depth = 2


class Bare:
    """Nothing but data of its class."""

    __slots__ = ()
    depth = 2


class Kind(StrEnum):
    """What a model is told to do."""

    UP = "up"

    def scaled(self, x: Tensor) -> Tensor:
        return x * len(self.value)


def _doubled(x: Tensor) -> Tensor:
    return x * SCALE * _doubled.times  # type: ignore[attr-defined,no-any-return]


_doubled.times = 2  # type: ignore[attr-defined]
VARIABLE: ContextVar[int] = ContextVar("VARIABLE", default=1)


@pytest.mark.parametrize(
    ("held", "act", "owner", "name", "value"),
    [
        (Config, lambda m, x: x * m.st.width, Config, "width", 4),
        (Config, lambda m, x: x * getattr(m.st, "width"), Config, "width", 4),  # noqa: B009
        (Config(), lambda m, x: x * m.st.width, Config, "width", 4),
        (Config, lambda m, x: x * m.st.scale(), Config, "scale", lambda: 3.0),
        (Config, lambda m, x: x * m.st.scale(), __name__, "SCALE", 3.0),
        (Config, lambda m, x: x * m.st.model.depth, Model, "depth", 4),
        (Config, lambda m, x: x * m.st.model.depth, Config, "model", Config),
        (Table(), lambda m, x: x * m.st.depth, Table, "depth", 4),
        ([Bare()], lambda m, x: x * m.st[0].depth, Bare, "depth", 4),
        (Kind.UP, lambda m, x: m.st.scaled(x), Kind, "scaled", lambda kind, x: x),
        (settings, lambda m, x: x * m.st.SCALE, settings, "SCALE", 3.0),
        (settings, lambda m, x: m.st.shifted(x), settings, "SHIFT", 3.0),
        ([_doubled], lambda m, x: m.st[0](x), __name__, "SCALE", 3.0),
        ({"f": _doubled}, lambda m, x: m.st["f"](x), _doubled, "times", 3),
        (SGD([nn.Parameter(torch.ones(1))], 0.5), lambda m, x: x * m.st.defaults["lr"], None, "lr", 0.1),
    ],
)
def test_what_classes_modules_and_functions_in_attributes_hold_is_noticed(
    held: Any, act: Any, owner: Any, name: str, value: Any
) -> None:
    model = Holding(act)
    model.st = held
    captured = capture(model, bind_call(model, (torch.ones(3, 2),), {}))
    reads = Reads(model, captured, lambda path: type(model.get_submodule(path)))
    assert reads.hold(0) and reads.hold(0)
    changed = patch(f"{owner}.{name}", value) if isinstance(owner, str) else patch.object(owner, name, value)
    with patch.dict(held.defaults, {name: value}) if owner is None else changed:
        assert not reads.hold(0)
    assert reads.hold(0)
    with patch(f"{__name__}.BASE", 7.0):  # which nobody names
        assert reads.hold(0)


def test_context_variables_in_attributes_are_noticed() -> None:
    model = Holding(lambda m, x: x * m.st.get())
    model.st = VARIABLE
    captured = capture(model, bind_call(model, (torch.ones(3, 2),), {}))
    reads = Reads(model, captured, lambda path: type(model.get_submodule(path)))
    token = VARIABLE.set(2)
    assert not reads.hold(0)
    VARIABLE.reset(token)
    assert reads.hold(0)


def _set_width(m: Any, x: Tensor) -> Tensor:
    m.st.width += 1
    return x


def _counted_calls(m: Any, x: Tensor) -> Tensor:
    m.st.times += 1
    return x * m.st.times


@pytest.mark.parametrize(("held", "act"), [(Config, _set_width), (_doubled, _counted_calls)])
def test_what_classes_and_functions_in_attributes_hold_is_not_changed(held: Any, act: Any) -> None:
    model = Holding(act)
    model.st = held
    with pytest.raises(CannotCapture, match="changes"):
        capture(model, bind_call(model, (torch.ones(3, 2),), {}))
    assert (Config.width, _doubled.times) == (3, 2)  # type: ignore[attr-defined]


def _filled(tensor: Tensor) -> None:
    tensor.numpy()[:] = 5


@pytest.mark.parametrize(
    ("act", "change"),
    [
        (
            lambda m, x: m.hidden[0](x),
            lambda m: setattr(m.hidden[0], "weight", nn.Parameter(torch.ones(2, 2))),
        ),
        (lambda m, x: m.hidden[1](x), lambda m: m.hidden[1].eval()),
        (lambda m, x: m.hidden[1](x), lambda m: setattr(m.hidden[1], "p", 0.1)),
        (lambda m, x: x * m.many[0], lambda m: setattr(m.many[0], "data", torch.zeros(2))),
        (lambda m, x: x * m.many[0][0].item(), lambda m: m.many[0].data.add_(1)),
        (lambda m, x: x * m.many[0], lambda m: _filled(m.many[0])),
        (lambda m, x: x * m.large[0][0], lambda m: setattr(m.large[0], "data", torch.zeros(100, 2))),
    ],
)
def test_memory_and_modules_out_of_sight_are_noticed(act: Any, change: Any) -> None:
    model = Holding(act)
    captured = capture(model, bind_call(model, (torch.ones(3, 2),), {}))
    reads = Reads(model, captured, lambda path: type(model.get_submodule(path)))
    assert reads.hold(0)
    assert reads.hold(0)
    change(model)
    assert not reads.hold(0)


def _halved(m: Any, x: Tensor) -> Tensor:
    m.hidden[1].p /= 2
    return x


def _appended(m: Any, x: Tensor) -> Tensor:
    m.hidden[1].seen.append(1)
    return x * len(m.hidden[1].seen)


def _counted(m: Any, x: Tensor) -> Tensor:
    m.hidden[1].count = m.hidden[1].count + 1
    return x * m.hidden[1].count


def _failing(m: Any, x: Tensor) -> Tensor:
    raise ValueError(_appended(m, _halved(m, x)))


def _made(m: Any, x: Tensor) -> Tensor:
    made = nn.Dropout(0.5)
    made.p -= 0.5
    y: Tensor = made(x)
    return y


@pytest.mark.parametrize("act", [_halved, _appended, _counted, _failing])
def test_modules_out_of_sight_are_not_changed(act: Any) -> None:
    model = Holding(act)
    model.hidden[1].seen = [0]
    model.hidden[1].register_buffer("count", torch.zeros(2))
    message = "no part of it" if act is not _failing else "cannot be captured"
    with pytest.raises(CannotCapture, match=message):
        capture(model, bind_call(model, (torch.ones(3, 2),), {}))
    assert (model.hidden[1].p, model.hidden[1].seen) == (0.5, [0])
    assert torch.equal(model.hidden[1].count, torch.zeros(2))


NUMBERS, TABLES = torch.zeros(3), [torch.zeros(300)]


def _into_a_global(m: Any, x: Tensor) -> Tensor:
    NUMBERS.add_(1)
    return x * NUMBERS.sum()


def _into_a_list(m: Any, x: Tensor) -> Tensor:
    TABLES[0][:5] = 7
    TABLES[0][1].mul_(2)
    torch.add(TABLES[0], 1, out=TABLES[0])
    return x


def _into_a_buffer(m: Any, x: Tensor) -> Tensor:
    m.hidden[1].count += 1
    return x


def _into_a_weight(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.hidden[0].weight.fill_(2)
    return x


@pytest.mark.parametrize("act", [_into_a_global, _into_a_list, _into_a_buffer, _into_a_weight])
def test_what_a_trace_writes_outside_is_taken_back(act: Any) -> None:
    """Calls on tensors that are not traced are run, not recorded."""
    model = Holding(act)
    model.hidden[1].register_buffer("count", torch.zeros(2))
    held = [NUMBERS, *TABLES, model.hidden[1].count, model.hidden[0].weight]
    before = [x.detach().clone() for x in held]
    with pytest.raises(CannotCapture, match="changes"):
        capture(model, bind_call(model, (torch.ones(3, 2),), {}))
    assert all(map(torch.equal, held, before))


def test_the_systems_random_numbers() -> None:
    """They have no state to compare: a model may hold their source, but not draw of it."""
    call = {"x": torch.ones(3, 2)}
    for draw in (lambda m, x: x * m.source.random(), lambda m, x: x * secrets.randbelow(9)):
        model = Holding(draw)
        model.source = random.SystemRandom()
        with pytest.raises(CannotCapture, match="random numbers of the system"):
            capture(model, call)
        model.act = lambda m, x: x * bool(m.source)
        capture(model, call)


def test_modules_that_forward_makes_are_its_own() -> None:
    model = Holding(_made)
    assert (
        capture(model, bind_call(model, (torch.ones(3, 2),), {})).outer
        == capture(Holding(lambda m, x: x), {"x": torch.ones(3, 2)}).outer
    )


STEPS = 1


class Stepping(nn.Module):
    """Gives a global another value."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        global STEPS
        STEPS += 1
        for layer in self.layers:
            x = layer(x)
        return x * STEPS


@pytest.mark.parametrize("capture", [capture, capture_repeated])
def test_globals_are_not_given_other_values(capture: Any) -> None:
    model = Stepping()
    with pytest.raises(CannotCapture, match=r"changes the global .*STEPS"):
        capture(model, bind_call(model, (torch.ones(3, 2),), {}))
    assert STEPS == 1


class Peeking(nn.Module):
    """Makes numbers of tensors that are attributes."""

    def __init__(self, peek: Any) -> None:
        super().__init__()
        self.one, self.many, self.twin, self.peek = torch.tensor(2), torch.ones(3), torch.ones(3), peek
        self.listed = [torch.tensor(2)]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.peek(self)


@pytest.mark.parametrize(
    ("change", "peek"),
    [
        (lambda model: model.one.fill_(5), lambda model: int(model.one)),
        (lambda model: model.one.fill_(5), lambda model: int(model.one + 1)),
        (lambda model: setattr(model, "one", torch.tensor(5)), lambda model: 2 if model.one * 2 > 4 else 3),
        (lambda model: model.listed[0].fill_(5), lambda model: (model.listed[0] + 1).item()),
        (lambda model: model.twin.fill_(5), lambda model: 2 if torch.equal(model.many, model.twin) else 3),
    ],
)
def test_numbers_that_follow_from_constants_select_the_program(change: Any, peek: Any) -> None:
    model = Peeking(peek)
    captured = capture(model, bind_call(model, (torch.ones(3, 2),), {}))
    reads = Reads(model, captured, lambda path: type(model.get_submodule(path)))
    assert reads.hold(0)
    change(model)
    assert not reads.hold(0)


_LIBRARY = """
CACHE = {}
def doubled(x):
    CACHE.setdefault("calls", 0)
    return x * 2
"""


def test_what_an_installed_package_keeps_for_itself_is_its_own_affair(tmp_path: Path) -> None:
    """As einops keeps the backends that it has met; the same in the user's own code is refused."""
    for folder in ("site-packages", "own"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder[:4]}_filling.py").write_text(_LIBRARY)

    class Doubles(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.function(x)
            return y

    with patch.object(sys, "path", [*sys.path, *map(str, tmp_path.iterdir())]):
        theirs, mine = (importlib.import_module(f"{name}_filling").doubled for name in ("site", "own"))
    call = {"x": torch.ones(3, 2)}
    assert capture(Doubles(theirs), call).graph_module(torch.ones(3, 2))[0].sum() == 12
    with pytest.raises(CannotCapture, match=r"changes the global own_filling\.CACHE"):
        capture(Doubles(mine), call)


@pytest.mark.parametrize("values", [{"a": 1, "b": 2}, {"a": torch.sin, "b": torch.exp}])
def test_the_order_of_a_dict_counts(values: dict[str, Any]) -> None:
    unchanged = shot(values)
    assert unchanged(dict(values))
    assert not unchanged(dict(reversed(values.items())))

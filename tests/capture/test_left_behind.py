"""What a call leaves outside of its result, where no program could leave it: refused, not forgotten."""

from __future__ import annotations

import pickle
import random
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tpcompile.capture.export.capture_model import capture
from tpcompile.capture.repeats.capture_repeated import capture_repeated
from tpcompile.errors import CannotCapture
from tpcompile.ir.calls import bind_call

X = torch.ones(3, 4)


class Toy(nn.Module):
    """Its forward is given."""

    def __init__(self, act: Callable[..., Any]) -> None:
        super().__init__()
        self.up, self.act = nn.Linear(4, 4), act
        self.register_buffer("kept", torch.zeros(4))
        self.register_buffer("late", None)

    def forward(self, x: Tensor, box: Any = None, *more: Any) -> Any:
        done = self.act(self, self.up(x), box if box is not None else more)
        return x if done is None else done


def _replace(model: Toy, x: Tensor, box: Any) -> None:
    box["k"] = torch.cat([box["k"], x])


@pytest.mark.parametrize(
    ("where", "box", "act"),
    [
        ("box", [], lambda model, x, box: box.append(x)),
        ("box", {"k": X}, _replace),
        ("box", {"k": X, "seen": 3}, lambda model, x, box: box.update(seen=4)),
        ("box", (X, {"flags": [True]}), lambda model, x, box: box[1]["flags"].clear()),
        ("kept", None, lambda model, x, box: setattr(model, "kept", None)),
        ("late", None, lambda model, x, box: setattr(model, "late", x.amax(0))),
    ],
)
def test_it_is_refused(where: str, box: Any, act: Callable[..., Any]) -> None:
    model = Toy(act)
    with pytest.raises(CannotCapture, match=rf"(argument |removes _buffers\.){where}"):
        capture(model, bind_call(model, (X, box), {}))


NUMBERS = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("held", "act"),
    [
        (np.zeros(2), lambda model, x, box: x * float(model.held.__iadd__(1)[0])),
        (np.zeros(()), lambda model, x, box: x * float(model.held.__iadd__(1))),
        (bytearray(b"0"), lambda model, x, box: model.held.append(1)),
        ([array("d", [1.0])], lambda model, x, box: model.held[0].append(1)),
        ({"draw": random.Random(0)}, lambda model, x, box: x * model.held["draw"].random()),
        (np.random.default_rng(0), lambda model, x, box: x * model.held.random()),
        (None, lambda model, x, box: x * NUMBERS.random()),
    ],
)
def test_what_shows_no_change_is_refused(held: Any, act: Callable[..., Any]) -> None:
    model = Toy(act)
    model.held = held
    before = pickle.dumps((model.held, NUMBERS))
    with pytest.raises(CannotCapture, match=r"held|NUMBERS"):
        capture(model, bind_call(model, (X,), {}))
    assert pickle.dumps((model.held, NUMBERS)) == before


def test_a_set_that_grows_is_left_behind() -> None:
    model = Toy(lambda model, x, box: model.held.add(x.dim()))
    model.held = {7}
    captured = capture(model, bind_call(model, (X,), {}))
    assert model.held == {7}
    captured.writes[0].write(model, [])
    assert model.held == {2, 7}


def test_what_is_only_read_is_not() -> None:
    model = Toy(lambda model, x, box: [x, *box[0].values(), box[1]])
    capture(model, bind_call(model, (X, [{"k": X, "n": 2}, None]), {}))


WANTS = torch.ones(4, requires_grad=True)


@pytest.mark.parametrize(
    ("held", "wanting", "act"),
    [
        (None, 1, lambda model, x, box: x * WANTS),
        ([nn.Linear(4, 4)], 2, lambda model, x, box: model.held[0](x)),
        ({"w": torch.ones(4, requires_grad=True)}, 1, lambda model, x, box: x + model.held["w"]),
        (torch.ones(4, requires_grad=True), 0, lambda model, x, box: x + model.held),  # fetched at every call
    ],
)
def test_constants_that_want_gradients_are_noted(held: Any, wanting: int, act: Callable[..., Any]) -> None:
    model = Toy(act)
    model.held = held
    assert len(capture(model, bind_call(model, (X,), {})).detached) == wanting


def test_gradients_of_tensors_in_repeated_layers_stay() -> None:
    """Each layer has a tensor of its own, as an attribute: one cannot stand for all."""
    model = nn.Sequential(*(Toy(lambda model, x, box: x * model.held) for _ in range(6)))
    for layer in model:
        layer.held = torch.ones(4, requires_grad=True)
    captured = capture_repeated(model, bind_call(model, (X,), {}))
    assert [spec.kind for spec in captured.inputs].count("attribute") == 6

"""Python that depends on the order in which an argument's elements are in memory, or on where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tpcompile.capture.export.capture_model import capture
from tpcompile.capture.export.captured import Captured
from tpcompile.errors import CannotCapture
from tpcompile.ir.calls import bind_call

Ask = Callable[[Any, Tensor], Any]
X = torch.linspace(-1, 1, 60).view(3, 5, 4)
ACROSS = X.transpose(0, 1).contiguous().transpose(0, 1)


class Asking(nn.Module):
    """A layer, a weight of another order, and a question."""

    def __init__(self, ask: Ask) -> None:
        super().__init__()
        self.up, self.ask = nn.Linear(4, 6), ask
        self.turned = nn.Parameter(torch.ones(4, 6).t())

    def forward(self, x: Tensor) -> Any:
        return self.ask(self, x)


def _captured(ask: Ask) -> Captured:
    model = Asking(ask)
    return capture(model, bind_call(model, (X,), {}))


def _sets(m: Any, x: Tensor) -> Tensor:
    y = x + 1
    y.flatten()[:7] = 0
    return y


def _scales(m: Any, x: Tensor) -> Tensor:
    y = x.exp()
    y.reshape(-1).mul_(2)
    return y


def _into(m: Any, x: Tensor) -> Tensor:
    y = x.clone()
    z = y.ravel()
    torch.add(z, 1, out=z)
    return y


def _source(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    z = y.contiguous()
    F.relu(y, inplace=True)
    return z


@pytest.mark.parametrize(
    "ask",
    [
        lambda m, x: x * x.dim_order()[0],
        lambda m, x: x + torch.as_strided_copy(x, (4,), (1,)),
        lambda m, x: x + (x * 1).as_strided_((4,), (1,)),
        _sets,
        _scales,
        _into,
        _source,
    ],
)
def test_what_depends_on_the_order_holds_for_one(ask: Ask) -> None:
    captured = _captured(ask)
    assert captured.asks_strides
    assert captured.accepts([X]) is None
    assert "not contiguous" in str(captured.accepts([ACROSS]))


@pytest.mark.parametrize(
    "ask",
    [
        lambda m, x: m.up(x).reshape(-1).mul_(2),  # a layer's result has an order of its own
        lambda m, x: x.reshape(-1) * 2,
        lambda m, x: (x + 1).mul_(2).flatten(),
        lambda m, x: x.new_zeros(x.shape).flatten().add_(1),
        lambda m, x: torch.vmap(lambda row: row.reshape(-1) * 2)(x),
    ],
)
def test_the_rest_holds_for_every_order(ask: Ask) -> None:
    captured = _captured(ask)
    assert not captured.asks_strides
    assert captured.accepts([ACROSS]) is None


def _caught(m: Any, x: Tensor) -> Tensor:
    try:
        return x * (x.data_ptr() % 2)
    except Exception:
        return x


@pytest.mark.parametrize(
    "ask",
    [
        _caught,
        lambda m, x: x * (2 if x.is_set_to(x.contiguous()) else 3),
        lambda m, x: x * (2 if x._is_view() else 3),
        lambda m, x: x * (2 if x.untyped_storage() is x.reshape(-1).untyped_storage() else 3),
        lambda m, x: x * (2 if x.is_shared() else 3),
    ],
)
def test_where_a_tensor_is_in_memory_is_refused(ask: Ask) -> None:
    with pytest.raises(CannotCapture, match="where a tensor is in memory"):
        _captured(ask)


@pytest.mark.parametrize(
    "ask", [lambda m, x: m.turned.is_contiguous(), lambda m, x: m.turned.as_strided((2,), (1,))]
)
def test_the_order_of_a_weight_that_is_to_change_is_refused(ask: Ask) -> None:
    with pytest.raises(CannotCapture, match="order of a weight"):
        _captured(lambda m, x: (x * 2, ask(m, x)))

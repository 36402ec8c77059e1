"""What python asks of an open size, or of a tensor's values, is answered as in eager mode, or refused."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tpcompile.capture.export.capture_model import capture
from tpcompile.capture.export.captured import Captured
from tpcompile.errors import CannotCapture
from tpcompile.ir.calls import bind_call

LENGTHS = (3, 4, 7)
ADD = torch.ops.aten.add.Tensor


class Asking(nn.Module):
    """Asks one question."""

    def __init__(self, ask: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.ask = ask

    def forward(self, x: Tensor) -> Any:
        return self.ask(x)


def _caught(x: Tensor) -> Tensor:
    try:
        return x * {3: 2.0, 4: 5.0}[x.shape[0]]
    except (KeyError, TypeError):
        return x


def _matched(x: Tensor) -> Tensor:
    match x.shape[0]:
        case 4:
            return x * 2
        case int():
            return x * 3
    return x


@functools.cache
def _kept(length: int) -> int:
    return length**2


def _spoken(x: Tensor) -> Tensor:
    logging.getLogger("tests").debug("of length %s", x.shape[0])
    torch._assert(x.shape[0] > 1, f"{x.shape[0]} is too short")
    if x.shape[0] > 100:
        raise ValueError(f"{x.shape[0]} is too long")
    assert x.shape[1] == 2, f"{x.shape}, {x}"
    return x


QUESTIONS: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "isinstance": (lambda x: x * 2 if isinstance(x.shape[0], int) else x, 1),
    "isinstance of several": (lambda x: x * 2 if isinstance(x.size(0), (str, (float, int))) else x, 1),
    "isinstance, and large": (lambda x: x * 2 if isinstance(x.shape[0], int) and x.shape[0] > 3 else x, 2),
    "of a quotient": (lambda x: x * 2 if isinstance(x.shape[0] / 2, float) else x, 1),
    "of a comparison": (lambda x: x * 2 if isinstance(x.shape[0] > 3, bool) else x, 2),
    "type": (lambda x: x * 2 if type(x.shape[0]) is int else x, 1),
    "type of a tensor": (lambda x: x * 2 if type(x + 1) is Tensor else x, 1),
    "name of a type": (lambda x: x * len(type(x.shape[0]).__name__), 1),
    "match": (_matched, 3),
    "text": (lambda x: x * 2 if str(x.shape[0]) == "4" else x, 3),
    "formatted": (lambda x: x * {"03": 2.0, "04": 3.0}.get(f"{x.shape[0]:02}", 5.0), 3),
    "text of a shape": (lambda x: x * 2 if repr(x.shape) == "torch.Size([4, 2])" else x, 3),
    "text of a quotient": (lambda x: x * len("%s" % (x.shape[0] / 8)), 3),
    "text of a comparison": (lambda x: x * 2 if str(x.shape[0] > 3) == "True" else x, 2),
    "is": (lambda x: x * 2 if (x.shape[0] > 3) is True else x, 2),
    "an error that is caught": (_caught, 3),
    "a hash": (lambda x: x * 2 if x.shape[:1] in {(4,): 1} else x, 3),
    "what is kept by size": (lambda x: x * _kept(x.shape[0]), 3),
    "what is said": (_spoken, 1),
}


@pytest.mark.parametrize(("ask", "programs"), QUESTIONS.values(), ids=QUESTIONS)
def test_sizes_answer_as_numbers(ask: Callable[[Tensor], Any], programs: int) -> None:
    model, captured = Asking(ask), list[Captured]()
    for length in (*LENGTHS, *LENGTHS):
        x = torch.linspace(-1, 1, 2 * length).view(length, 2)
        found = next((c for c in captured if c.accepts([x]) is None), None)
        if found is None:
            captured.append(found := capture(model, bind_call(model, (x,), {})))
        torch.testing.assert_close(found.graph_module(x)[0], model(x))
    assert len(captured) <= programs


def _tried(x: Tensor) -> Tensor:
    try:
        return x * 2 if x.sum() > 0 else x * 3
    except RuntimeError:
        return x


def _suppressed(x: Tensor) -> Tensor:
    times = 1
    with contextlib.suppress(Exception):
        times = int(x.argmax())
    return x * times


def _hooked(x: Tensor) -> Tensor:
    try:
        x.register_hook(lambda grad: 2 * grad)
    except Exception:
        return x * 2
    return x


def _saved(x: Tensor) -> Tensor:
    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return x
    except Exception:
        return x * 2


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (_saved, "what autograd saves"),
        (_tried, "only while it is traced"),
        (_suppressed, "only while it is traced"),
        (_hooked, "registers a hook"),
        (lambda x: x * len(str(x)), "text of a tensor"),
        (lambda x: x * len(f"{x.sum()}"), "text of a tensor|data-dependent"),
        (lambda x: x * 2 if torch.is_inference_mode_enabled() else x, "inference mode"),
        (lambda x: x * 2 if (x + 1).is_inference() else x, "inference mode"),
    ],
)
def test_what_follows_from_values_is_refused(ask: Callable[[Tensor], Any], said: str) -> None:
    model, x = Asking(ask), torch.ones(3, 2)
    with pytest.raises(CannotCapture, match=said):
        capture(model, bind_call(model, (x,), {}))


class Ordered(nn.Module):
    """Goes through a set of texts."""

    def __init__(self) -> None:
        super().__init__()
        self.names = [f"layer {i}" for i in range(9)]

    def forward(self, x: Tensor) -> tuple[Tensor, list[bool]]:
        for name in set(self.names[::-1]):
            x = x + self.names.index(name)
        found: Any = set(self.names)
        return x, [isinstance(found, set), isinstance({1}, set), type(found) is set, isinstance([], set)]


def test_sets_of_texts_have_one_order() -> None:
    """Python's own is another one in every process."""
    model = Ordered()
    captured = capture(model, bind_call(model, (torch.ones(3),), {}))
    added = [node.args[1] for node in captured.graph_module.graph.find_nodes(op="call_function", target=ADD)]
    assert added == list(range(9))
    assert [spec.value for spec in captured.outputs[1:]] == [True, True, True, False]

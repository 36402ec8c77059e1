"""What the ranks do in ``tests/runtime/test_last_call.py``: calls that repeat, and others in between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import tpcompile
from tests.on_ranks.models import error, mesh
from tpcompile.runtime.runtime import Runtime

WIDTH = 8


class Asking(nn.Module):
    """Depends on an argument, on an attribute, on its mode, on the structure of a container, on identity."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.scale, self.table = 2.0, {"shift": 1.0}

    def forward(
        self, x: Tensor, more: dict[str, Any], *, flag: bool = False, times: float = 1.0, mask: Any = None
    ) -> Tensor:
        y = self.down(torch.relu(self.up(x))) * self.scale + self.table["shift"]
        for place, (name, one) in enumerate(more.items()):
            y = y + one * (place + (3 if name == "b" else 1))
        if mask is not None:
            y = y * mask
        if self.training:
            y = y + 5
        if more.get("a") is x:
            y = y - 7
        found: Tensor = (-y if flag else y) * times
        return found


def _pair(**options: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    whole = Asking().eval()
    return whole, tpcompile.parallelize(copy.deepcopy(whole), mesh(), **options)


@contextmanager
def _looked_for() -> Iterator[list[str]]:
    """Notes the calls whose program is looked for."""
    looked: list[str] = []
    original = Runtime._call

    def call(self: Runtime, model: nn.Module, args: Any, kwargs: Any, entry: Any) -> Any:
        looked.append("" if entry is None else entry.path)
        return original(self, model, args, kwargs, entry)

    with mock.patch.object(Runtime, "_call", call):
        yield looked


def _tensors(rows: int) -> tuple[Tensor, dict[str, Tensor]]:
    return torch.randn(rows, WIDTH), {"a": torch.randn(rows, WIDTH)}


def again() -> dict[str, Any]:
    """Calls of several sizes; those after the second are not looked for, if their sizes were compared."""
    whole, sharded = _pair()
    errors = []
    with torch.no_grad():
        for rows in (4, 6, 6, 9):
            x, more = _tensors(rows)
            errors.append(error(sharded(x, more, flag=True), whole(x, more, flag=True)))
        with _looked_for() as looked:
            for rows in (4, 9, 6):
                x, more = _tensors(rows)
                errors.append(error(sharded(x, more, flag=True), whole(x, more, flag=True)))
    return {"worst": max(errors), "looked for": looked}


def _set_scale(model: Any) -> None:
    model.scale = 3.0


def _set_shift(model: Any) -> None:
    model.table["shift"] = 4.0


CHANGES: dict[str, Callable[[Any], Any]] = {
    "attribute": _set_scale,
    "inside of an attribute": _set_shift,
    "mode": lambda model: model.train(),
    "type": lambda model: model.double(),
}


def changes() -> dict[str, Any]:
    """Per kind of change the error of the call after it, if there is any; between them calls are known."""
    whole, sharded = _pair()
    wrong: dict[str, float] = {}
    x, more = _tensors(4)
    vector = torch.randn(WIDTH)

    def both(what: str, *args: Any, under: AbstractContextManager[Any] | None = None, **kwargs: Any) -> None:
        with under or nullcontext():
            mine, theirs = sharded(*args, **kwargs), whole(*args, **kwargs)
        if mine.dtype != theirs.dtype or mine.requires_grad != theirs.requires_grad:
            wrong[f"{what}: form"] = 1.0
        if (found := error(mine, theirs)) > 1e-2:
            wrong[what] = found

    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "sign of zero": ((x, more), {"times": -0.0}),
        "None given": ((x, more), {"times": 1.0, "mask": None}),
        "what was None": ((x, more), {"times": 1.0, "mask": vector}),
        "keys": ((x, {"b": more["a"]}), {"times": 1.0}),
        "dimensions": ((x[None], more), {"times": 1.0}),
        "the same tensor": ((x, {"a": x}), {"times": 1.0}),
        "a parameter": ((nn.Parameter(x), more), {"times": 1.0}),
        "not contiguous": ((x.t().contiguous().t(), more), {"times": 1.0}),
    }
    known = []
    sharded(x, more, times=1.0)  # the first call captures a program, two more are looked for

    def usual(what: str) -> None:
        for _ in range(2):
            both(f"before {what}", x.to(whole.up.weight.dtype), more, times=1.0)
        with _looked_for() as looked:
            both(f"known before {what}", x.to(whole.up.weight.dtype), more, times=1.0)
        known.extend([what] if looked else [])

    for what, (args, kwargs) in calls.items():
        usual(what)
        both(what, *args, **kwargs)
    modes = {"autocast": torch.autocast("cpu", torch.bfloat16), "no gradients": torch.no_grad()}
    for what, mode in modes.items():
        usual(what)
        both(what, x, more, times=1.0, under=mode)
    for what, change in CHANGES.items():
        usual(what)
        change(whole)
        change(sharded)
        both(what, x.to(whole.up.weight.dtype), more, times=1.0)
    return {"wrong": wrong, "not known": known}

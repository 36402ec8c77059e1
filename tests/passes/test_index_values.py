"""What is said of integer and truth values, against the values."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

from tests.helpers import programs
from tpcompile.passes.evaluate_indices import IndexValues
from tpcompile.passes.index_values import FALSE, Affine, Known, Truth
from tpcompile.planner.search.quantities import symbol_hints


class _Made(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return *(make(x) for make in (KNOWN | UNKNOWN).values()), x + 1.0


def _positions(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])[None].expand(x.shape[0], -1)


def _packed(x: Tensor) -> Tensor:
    """Which of several sequences in one row a position belongs to, as transformers finds it: the first."""
    at = _positions(x)
    return (torch.diff(at, prepend=at[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def _looked_up(x: Tensor) -> Tensor:
    rows, at = torch.arange(x.shape[0])[:, None, None], torch.arange(x.shape[1])
    keys = _positions(x)[rows, at[None, None, :]]
    return (keys <= _positions(x)[rows, at[None, :, None]]) & (_packed(x)[rows, at[None, :, None]] == 0)


KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "positions": _positions,
    "start and step": lambda x: torch.arange(3, 20, 4)[1:].unsqueeze(1) - 2,
    "sliced": lambda x: torch.arange(9)[2:] + x.shape[1],
    "transposed": lambda x: (torch.arange(4)[:, None] - torch.arange(6)).t(),
    "causal": lambda x: torch.arange(x.shape[1]) <= torch.arange(x.shape[1])[:, None],
    "strictly": lambda x: torch.arange(x.shape[1]) > torch.arange(x.shape[1])[:, None],
    "window": lambda x: (
        (_positions(x)[:, :, None] - 2 < torch.arange(x.shape[1])) & (torch.arange(x.shape[1]) >= 1)
    ),
    "all": lambda x: torch.arange(x.shape[1]) < x.shape[1],
    "none": lambda x: (torch.arange(4) - torch.arange(4) != 0) & (torch.arange(4) > 1),
    "packed": _packed,
    "looked up": _looked_up,
    "one packed": lambda x: _packed(x[:, :1]),
    "one difference": lambda x: torch.diff(
        torch.arange(1)[None] + x.shape[1], prepend=_positions(x)[:1, :1] - 2
    ),
}
UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "data": lambda x: x > 0,
    "squares": lambda x: torch.arange(x.shape[1]) * torch.arange(x.shape[1]),
    "from the end": lambda x: torch.arange(5)[torch.arange(5) - 2],
    "broken diff": lambda x: torch.diff(_positions(x), prepend=_positions(x)[:, :1] - 2, dim=-1),
    "counted": lambda x: (torch.arange(x.shape[1]) >= 1).cumsum(0),
    "equal": lambda x: torch.arange(x.shape[1]) == torch.arange(x.shape[1])[:, None],
}


@cache
def _found() -> tuple[dict[str, Known | None], dict[Any, int]]:
    """What is said of all of them, from one program; and the example's sizes of its symbols."""
    program = programs.canonicalised(_Made(), torch.randn(3, 7, 4), dynamic=True)
    values, outputs = IndexValues(), program.outputs()
    said = {name: values.of(out) for name, out in zip(KNOWN | UNKNOWN, outputs, strict=False)}
    return said, symbol_hints(program.graph)


def _evaluated(value: Affine, symbols: dict[Any, int], sizes: tuple[int, ...]) -> Tensor:
    number = [int(sympy.sympify(e).subs(symbols)) for e in (value.start, *value.steps)]
    total = torch.full(sizes, number[0])
    for dim, (step, size) in enumerate(zip(number[1:], sizes, strict=True)):
        total = total + (step * torch.arange(size)).view(-1, *[1] * (len(sizes) - dim - 1))
    return total


@pytest.mark.parametrize("name", KNOWN)
def test_values_are_what_is_said(name: str) -> None:
    said, hints = _found()
    value = said[name]
    assert sorted(hints.values()) == [3, 7], "both sizes are open"
    for sizes in ((3, 7), (2, 9)):
        symbols = {s: sizes[(3, 7).index(n)] for s, n in hints.items()}
        wanted = KNOWN[name](torch.randn(*sizes, 4))
        shape = tuple(wanted.shape)
        if isinstance(value, Affine):
            got = _evaluated(value, symbols, shape)
        elif value == FALSE:
            got = torch.zeros(shape, dtype=wanted.dtype)
        else:
            assert isinstance(value, Truth)
            got = torch.ones(shape, dtype=torch.bool)
            for condition in value.conditions:
                got &= _evaluated(condition, symbols, shape) >= 0
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", UNKNOWN)
def test_nothing_is_said_of_other_values(name: str) -> None:
    assert _found()[0][name] is None


def test_what_always_holds_is_left_out() -> None:
    assert _found()[0]["all"] == Truth()

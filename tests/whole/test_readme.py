"""The report on the README's first screen is what `verify` prints, but for numbers that differ by machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tpcompile
from tpcompile.rules import table

README = Path(__file__).parents[2] / "README.md"


class Norm(nn.Module):
    """A norm that is an operator of somebody's library."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, width), nn.Linear(width, 64)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.ops.mylib.rms(self.up(x), self.scale))
        return y


@pytest.fixture
def wrong_rule(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The norm's operator, with a rule that says that its rows may be divided."""
    with torch.library._scoped_library("mylib", "DEF") as library:
        library.define("rms(Tensor x, Tensor scale) -> Tensor")
        library.impl(
            "rms",
            lambda x, w: x * (x.square().mean(-1, True) + 1e-6).rsqrt() * w,
            "CompositeExplicitAutograd",
        )
        monkeypatch.setattr(table, "_USER", {})
        tpcompile.register_rule("mylib.rms", "... d, d -> ... d")
        yield


@pytest.mark.usefixtures("wrong_rule")
def test_the_report() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Norm(256)).double()
    report = str(tpcompile.verify(model, 4, (torch.randn(2, 10, 64).double(),), gradients=False))
    (shown,) = re.findall(r">>> print\(tpcompile\.verify\(.*\n((?:.+\n)+?)```", README.read_text())
    assert _plain(report) == _plain(shown)


def _plain(text: str) -> list[str]:
    """Its lines without times, errors, symbols' numbers and places in files."""
    text = re.sub(r"in [\d.]+ m?s:", "in #:", text)
    text = re.sub(r"\d\.\d+(e-\d+)?", "#", text)
    text = re.sub(r"\bs\d+\b", "s", text)
    return re.sub(r'File "[^"]*", line \d+', "File", text).strip().splitlines()

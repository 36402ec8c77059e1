"""What is being done is said on a terminal, and nowhere else."""

from __future__ import annotations

import io
import sys

import pytest

from tpcompile.ranks.agree import from_first, together
from tpcompile.ranks.progress import progress


class Stream(io.StringIO):
    """Stands for stderr."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def fail() -> None:
    raise ValueError


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_told_what_is_done(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    assert together(None, "capture the model", lambda: stream.getvalue()) == stream.getvalue().removesuffix(
        "\r\x1b[K"
    )
    assert ("capture the model" in stream.getvalue()) == terminal
    assert from_first(None, lambda: 3) == 3
    assert ("make the plan" in stream.getvalue()) == terminal
    with pytest.raises(ValueError):
        together(None, "fail", fail)
    assert stream.getvalue().endswith("\r\x1b[K") == terminal  # the line is gone
    before = stream.getvalue()
    with progress("lower the model", 1):
        assert stream.getvalue() == before
    monkeypatch.setattr(sys, "stderr", None)
    with progress("lower the model"):
        pass

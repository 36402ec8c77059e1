"""What a model checks of values is looked at after a program has run, before anything is handed out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tpcompile.capture.export.specs import OutputSpec
from tpcompile.errors import TpCompileError

Checks = tuple[tuple[int, OutputSpec], ...]


def checks_among(specs: Sequence[OutputSpec]) -> Checks:
    """The places of the checks among a program's results."""
    return tuple((at, spec) for at, spec in enumerate(specs) if spec.kind == "check")


def refuse_failed(checks: Checks, flat: Sequence[Any]) -> None:
    """Looks at the checks; dynamo can trace it.

    All ranks find the same: the values are whole on each of them. On other devices than the CPU, and in
    compiled code, nothing waits for the value: a check that fails is then an error of the device, as the
    model's own would be.

    Raises:
        TpCompileError: one has failed.
    """
    for at, spec in checks:
        holds, where = flat[at], spec.name.partition(": ")[2]
        what = f"a check of the model's forward has failed{': ' if spec.value else ''}{spec.value}"
        if torch.compiler.is_compiling() or holds.device.type != "cpu":
            torch._assert_async(holds, _plain(f"{what} ({where})"))
        elif not holds:
            raise TpCompileError(what, where=where, todo="call the model with what it demands")


def _plain(text: str) -> str:
    """Text that Inductor may put into a C++ string, which it does as it is."""
    return text.replace("\\", "/").replace('"', "'").replace("\n", " ")

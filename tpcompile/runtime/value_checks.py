"""What a model checks of values is looked at after a program has run, before anything is handed out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tpcompile.capture.export.specs import OutputSpec
from tpcompile.errors import TpCompileError


@dataclass(frozen=True)
class ValueCheck:
    """A check among the results of a program.

    Attributes:
        at: its place there.
        what: what is said if it fails.
        where: where the model checks.
    """

    at: int
    what: str
    where: str


def checks_among(specs: Sequence[OutputSpec]) -> tuple[ValueCheck, ...]:
    """The checks among a program's results."""
    said = "a check of the model's forward has failed"
    return tuple(
        ValueCheck(at, f"{said}: {spec.value}" if spec.value else said, spec.name.partition(": ")[2])
        for at, spec in enumerate(specs)
        if spec.kind == "check"
    )


def refuse_failed(checks: Sequence[ValueCheck], flat: Sequence[Any]) -> None:
    """Looks at the checks; dynamo can trace it.

    All ranks find the same: the values are whole on each of them. On other devices than the CPU, and in
    compiled code, nothing waits for the value: a check that fails is then an error of the device, as the
    model's own would be.

    Raises:
        TpCompileError: one has failed.
    """
    for check in checks:
        holds = flat[check.at]
        if torch.compiler.is_compiling() or holds.device.type != "cpu":
            torch._assert_async(holds, _plain(f"{check.what} ({check.where})"))
        elif not holds:
            raise TpCompileError(check.what, where=check.where, todo="call the model with what it demands")


def _plain(text: str) -> str:
    """Text that Inductor may put into a C++ string, which it does as it is."""
    return text.replace("\\", "/").replace('"', "'").replace("\n", " ")

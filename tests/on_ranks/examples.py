"""What ranks do in ``test_examples``: an example's main function, in processes that are there already."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def main_of(name: str, *args: Any) -> str:
    """Runs an example; what it prints. The environment, in which some set their rank, is as before."""
    out = io.StringIO()
    with mock.patch.dict(os.environ), contextlib.redirect_stdout(out):
        _example(name).main(*args)
    return out.getvalue()


def failed_checks() -> list[str]:
    """What the demo's checks say of a value that is off, and of what is not true."""
    demo, messages = _example("demo"), []
    value = torch.ones(3)
    for check in (lambda: demo.check("it", value + 1e-4, value), lambda: demo.require(False, "it is so")):
        try:
            check()
        except RuntimeError as error:
            messages.append(str(error))
    demo.check("it", value + 1e-6, value)
    demo.require(True, "it is so")
    return messages


def trained_alone(name: str, folder: str, steps: int) -> list[float]:
    """The losses of an example of training, of a model that is not sharded."""
    example = _example(name)
    found: list[float] = example.losses(example.train(folder, steps, shard=False))
    return found


def _example(name: str) -> Any:
    with mock.patch.object(sys, "path", [str(EXAMPLES), *sys.path]):
        return importlib.import_module(name)

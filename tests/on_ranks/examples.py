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

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def main_of(name: str, *args: Any) -> str:
    """Runs an example; what it prints. The environment, in which some set their rank, is as before."""
    out = io.StringIO()
    with mock.patch.dict(os.environ), contextlib.redirect_stdout(out):
        _example(name).main(*args)
    return out.getvalue()


def strict_demo() -> None:
    """The first part of the demo, with a limit below rounding errors."""
    demo = _example("demo")
    with mock.patch.object(demo, "LIMIT", 1e-12):
        demo.rank_sentences()


def trained_alone(name: str, folder: str, steps: int) -> list[float]:
    """The losses of an example of training, of a model that is not sharded."""
    example = _example(name)
    found: list[float] = example.losses(example.train(folder, steps, shard=False))
    return found


def _example(name: str) -> Any:
    with mock.patch.object(sys, "path", [str(EXAMPLES), *sys.path]):
        return importlib.import_module(name)

"""What ranks do in ``test_examples``: an example's main function, in processes that are there already."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def main_of(name: str, layers: int | None, *args: Any) -> str:
    """Runs an example; what it prints. The environment, in which some set their rank, is as before.

    Args:
        name: the example.
        layers: how many layers its models of transformers get, if not those that it says.
        args: what its main function is called with.
    """
    out = io.StringIO()
    with mock.patch.dict(os.environ), contextlib.redirect_stdout(out), layers_are(layers):
        _example(name).main(*args)
    return out.getvalue()


@contextlib.contextmanager
def layers_are(layers: int | None) -> Iterator[None]:
    """Models of transformers that are made meanwhile have so many layers, whatever they are asked for."""
    make = PreTrainedModel.__init__

    def make_with_layers(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        config.num_hidden_layers = layers
        make(self, config, *args, **kwargs)

    with mock.patch.object(PreTrainedModel, "__init__", make if layers is None else make_with_layers):
        yield


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


def trained_alone(name: str, folder: str, layers: int, steps: int) -> list[float]:
    """The losses of an example of training, of a model that is not sharded."""
    example = _example(name)
    with layers_are(layers):
        found: list[float] = example.losses(example.train(folder, steps, shard=False))
    return found


def _example(name: str) -> Any:
    with mock.patch.object(sys, "path", [str(EXAMPLES), *sys.path]):
        return importlib.import_module(name)

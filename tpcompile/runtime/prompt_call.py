"""The call that ``generate`` makes of a model for a prompt, as the example to capture."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from tpcompile.capture.export.default_example import default_example
from tpcompile.errors import TpCompileError, refusing


class _Caught(BaseException):
    """The call is made: what comes after it doesn't matter."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


def prompt_call(model: nn.Module) -> dict[str, Any]:
    """The keyword arguments with which the model's ``generate`` calls it for one prompt, of 16 tokens.

    transformers' loop runs as far as this call, with the model's own generation configuration; the model
    itself doesn't run, and may be on ``meta``.

    Raises:
        TpCompileError: the model has no ``generate`` that calls it for a prompt of tokens.
    """
    where = f'example_kwargs="generate" of {type(model).__name__}'
    todo = "give example_kwargs: the arguments of a typical call"
    example = default_example(model) or {}
    generate = getattr(model, "generate", None)
    if not callable(generate) or example.keys() != {"input_ids"}:
        raise TpCompileError("it has no generate that takes tokens alone", where=where, todo=todo)
    devices = (parameter.device for parameter in model.parameters())
    prompt = example["input_ids"][:1].to(next((d for d in devices if d.type != "meta"), "cpu"))
    own = vars(model).get("forward")

    @functools.wraps(model.forward)
    def caught(**arguments: Any) -> None:
        raise _Caught(arguments)

    model.forward = caught
    try:
        with refusing("its generate fails", where=where, todo=todo):
            generate(prompt, max_new_tokens=2)
    except _Caught as call:
        return call.arguments
    finally:
        del model.forward
        if own is not None:
            model.forward = own
    raise TpCompileError("its generate does not call it", where=where, todo=todo)

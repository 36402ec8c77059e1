"""The tokens that a model generates greedily."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from tpcompile.errors import TpCompileError
from tpcompile.ir.check import Must

Steps = Annotated[int, Must("a number of tokens", lambda steps: steps >= 0)]
_NOT_GIVEN = ("labels", "use_cache", "past_key_values", "logits_to_keep", "cache_position")


def greedy(model: nn.Module, bound: Mapping[str, Any], steps: int) -> list[list[int]]:
    """The tokens that a model of transformers goes on with, greedily, behind a call's inputs.

    Raises:
        TpCompileError: the model does not generate.
    """
    generate = getattr(model, "generate", None)
    if generate is None:
        raise TpCompileError(
            "the model does not generate",
            where=type(model).__name__,
            todo="leave generate out, or give a model of transformers that does",
        )
    given = {
        name: value
        for name, value in bound.items()
        if name not in _NOT_GIVEN and isinstance(value, Tensor) and not name.startswith("decoder_")
    }
    with torch.no_grad():
        tokens = generate(**given, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, num_beams=1)
    found: list[list[int]] = tokens.tolist()
    return found

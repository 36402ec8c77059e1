"""The calls of which a step consists: a prompt, one more token behind a cache, a step of training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from tpcompile.capture.caches.register import is_cache
from tpcompile.capture.export.default_example import default_example
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import bind_call
from tpcompile.planner.dry_run.estimate import Mode
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.runtime.make_program import whole_captured


def token_call(model: nn.Module, mode: Mode, batch: int, seq: int) -> dict[str, Any]:
    """The call of a transformers model with so many texts of so many tokens.

    Raises:
        TpCompileError: the model is not given token ids.
    """
    example = default_example(model) or {}
    names = inspect.signature(model.forward).parameters
    tokens = {n: torch.zeros(batch, seq, dtype=torch.long) for n, x in example.items() if _is_tokens(x)}
    if not tokens:
        raise TpCompileError(
            "the model is not given token ids, so that nobody knows what a batch of texts is",
            where="batch, seq",
            todo="plan it with an example call, and leave batch and seq out",
        )
    call = {**example, **tokens}
    if mode == "train" and "labels" in names and _has_head(model):
        call["labels"] = torch.zeros(batch, seq, dtype=torch.long)
    if "use_cache" in names:
        call["use_cache"] = mode != "train"
    return bind_call(model, (), call)


def sizes_of_call(model: nn.Module, bound: Mapping[str, Any]) -> tuple[int, int] | None:
    """The batch and length of the token ids that a call brings, None if it brings none."""
    ids = bound.get(getattr(model, "main_input_name", "input_ids"))
    return (int(ids.shape[0]), int(ids.shape[1])) if ids is not None and _is_tokens(ids) else None


def next_call(
    model: nn.Module, before: GlobalProgram, prompt: Mapping[str, Any], batch: int
) -> dict[str, Any]:
    """The call for one more token, with the cache that a prompt's program has left.

    Args:
        model: the model.
        before: the prompt's program.
        prompt: its call.
        batch: texts.

    Raises:
        TpCompileError: the program returns no cache that a call takes.
    """
    results = [_without_values(value) for value in before.whole_outputs()]
    result = whole_captured(before).unflatten(results, dict(prompt))
    names = inspect.signature(model.forward).parameters
    caches = {n: getattr(result, n, None) for n in names}
    found = {n: cache for n, cache in caches.items() if is_cache(cache)}
    ids = getattr(model, "main_input_name", "")
    if not found or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TpCompileError(
            "the model returns no cache that its next call would take",
            where='mode="decode"',
            todo="estimate a model that generates from its own cache; of an encoder and decoder, the prompt",
        )
    call = {ids: torch.zeros(batch, 1, dtype=torch.long), **found}
    return bind_call(model, (), call | ({"use_cache": True} if "use_cache" in names else {}))


def _without_values(value: Any) -> Any:
    if not isinstance(value, Node):
        return value
    val = value.meta["val"]
    if not isinstance(val, Tensor):
        return val
    return torch.empty([int(size) for size in val.shape], dtype=val.dtype, device="meta")


def _is_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.long and value.ndim == 2


def _has_head(model: Any) -> bool:
    """Whether it predicts tokens, so that its labels are tokens."""
    head = getattr(model, "get_output_embeddings", None)
    return head is not None and head() is not None

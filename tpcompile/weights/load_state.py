"""Checks an ordinary state dict before a sharded model loads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tpcompile.errors import TpCompileError


def check_state(module: nn.Module, path: str, state: Mapping[str, Any], strict: bool) -> None:
    """Whether a state dict is one of whole tensors for a sharded model, or for a part of one.

    Args:
        module: the model or the part.
        path: the module's path in the model.
        state: tensors by name.
        strict: whether exactly the module's own keys must be there.

    Raises:
        TpCompileError: a key is missing or unexpected, or has another shape; nothing was changed.
    """
    own = nn.Module.state_dict(module, keep_vars=True)
    if strict:
        _check_keys(own, state)
    wrong = [
        f"{key}: {tuple(value.shape)} where the model has {tuple(mine.shape)}"
        for key, value in state.items()
        if isinstance(value, Tensor)
        and isinstance(mine := own.get(key), Tensor)
        and value.shape != mine.shape
    ]
    if wrong:
        raise TpCompileError(
            f"tensors of another model, or parts of tensors: {'; '.join(wrong[:3])}" + _more(wrong),
            where=path or type(module).__name__,
            todo="give whole tensors; every rank takes its part. Nothing was loaded",
        )


def _check_keys(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    for what, keys in (
        ("lacks", [k for k in own if k not in state]),
        ("has unexpected", [k for k in state if k not in own]),
    ):
        if keys:
            raise TpCompileError(
                f"the state dict {what} {', '.join(keys[:3])}{_more(keys)}",
                todo="give a state dict of this model, or strict=False; nothing was loaded",
            )


def _more(found: list[str]) -> str:
    return f" and {len(found) - 3} more" if len(found) > 3 else ""

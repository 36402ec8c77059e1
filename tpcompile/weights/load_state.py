"""Checks an ordinary state dict before a sharded model loads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tpcompile.errors import TpCompileError
from tpcompile.ranks.describe import describe_value

from .sharded_parameter import ShardedParameter
from .stored_part import StoredPart


def check_state(own: Mapping[str, Any], where: str, state: Mapping[str, Any], strict: bool) -> None:
    """Whether a state dict is one of whole tensors for a sharded model, or for a part of one.

    Args:
        own: its own state.
        where: what it is called.
        state: tensors by name.
        strict: whether exactly the module's own keys must be there.

    Raises:
        TpCompileError: a key is missing or unexpected, or has another shape; nothing was changed.
    """
    if strict:
        _check_keys(own, state)
    wrong = [
        f"{key}: {unfit}"
        for key, value in state.items()
        if isinstance(mine := own.get(key), Tensor) and (unfit := _unfit(value, mine))
    ]
    if wrong:
        raise TpCompileError(
            f"tensors of another model, or parts of tensors: {'; '.join(wrong[:3])}" + _more(wrong),
            where=where,
            todo="give whole tensors; every rank takes its part. Nothing was loaded",
        )


def _unfit(value: Any, mine: Tensor) -> str:
    """Why a value cannot be loaded into a tensor, or nothing."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__} where the model has a tensor"
    if value.shape != mine.shape:
        return f"{tuple(value.shape)} where the model has {tuple(mine.shape)}"
    if value.is_meta and not mine.is_meta:
        return "a tensor without values"
    return (
        "complex numbers where the model has real ones"
        if value.is_complex() and not mine.is_complex()
        else ""
    )


def own_parts(own: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The stored parts in a state dict as sharded parameters, by name.

    Args:
        own: the module's own state.
        state: the one to load.

    Raises:
        TpCompileError: a part is another rank's, or of another layout.
    """
    found: dict[str, Tensor] = {}
    for name, part in state.items():
        if isinstance(part, StoredPart):
            mine = own.get(name)
            placing = mine.placing if isinstance(mine, ShardedParameter) else None
            if placing is None or (part.rank, part.layout) != (placing.rank, placing.text()):
                raise TpCompileError(
                    f"the state dict was saved by rank {part.rank}, and has its parts, as they were then",
                    where=name,
                    todo="save full_state_dict(), or sharded_state_dict() with torch.distributed.checkpoint; "
                    "nothing was loaded",
                )
            found[name] = ShardedParameter(part.local.to(placing.axis.device_type), placing)
    return found


def state_lines(state: Mapping[str, Any], strict: bool, assign: bool) -> list[str]:
    """What ranks that load a state dict must have in common: of sharded parameters they hold their parts."""
    plain = (Tensor, nn.Parameter)
    lines = [
        f"{key}: {describe_value(value if type(value) in plain else type(value))}"
        for key, value in sorted(state.items())
    ]
    return [f"strict: {bool(strict)}, assign: {bool(assign)}", *lines]


def _check_keys(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    for what, keys in (
        ("lacks", [k for k in own if k not in state]),
        ("has unexpected", [k for k in state if k not in own]),
    ):
        if keys:
            raise TpCompileError(
                f"the state dict {what} {', '.join(keys[:3])}{_more(keys)}",
                where="load_state_dict",
                todo="give a state dict of this model, or strict=False; nothing was loaded",
            )


def _more(found: list[str]) -> str:
    return f" and {len(found) - 3} more" if len(found) > 3 else ""

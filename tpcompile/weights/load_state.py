"""Checks an ordinary state dict before a sharded model loads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tpcompile.errors import TpCompileError
from tpcompile.ir.names import first_few
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
            f"tensors of another model, or parts of tensors: {first_few(wrong, '; ')}",
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
    if value.layout is not mine.layout:
        return "a sparse tensor"
    return (
        "complex numbers where the model has real ones"
        if value.is_complex() and not mine.is_complex()
        else ""
    )


def unlike(own: Any, given: Any, where: str) -> str:
    """What makes a nested state another one than an optimizer's own; nothing if they are of one form.

    Args:
        own: mappings, lists, tensors and plain values.
        given: the state that is to take its place.
        where: what they are called.
    """
    if isinstance(own, Mapping):
        if not isinstance(given, Mapping):
            return f"{where} is a {type(given).__name__}"
        for what, keys in (
            ("lacks", own.keys() - given.keys()),
            ("has unexpected", given.keys() - own.keys()),
        ):
            if keys:
                return f"{where} {what} {min(map(str, keys))}"
        return next(filter(None, (unlike(v, given[k], f"{where}[{k!r}]") for k, v in own.items())), "")
    if isinstance(own, list | tuple):
        if not isinstance(given, list | tuple) or len(given) != len(own):
            return f"{where} is not a list of {len(own)}"
        if all(isinstance(v, str) for v in own):
            return "" if {*own} == {*map(str, given)} else f"{where} has other names"
        every = zip(own, given, strict=True)
        return next(filter(None, (unlike(v, g, f"{where}[{i}]") for i, (v, g) in enumerate(every))), "")
    if isinstance(own, Tensor):
        unfit = _unfit(given, own)
        return f"{where} is {unfit}".replace("where the model has", "instead of") if unfit else ""
    number = isinstance(given, Tensor) and given.numel() == 1
    plain = given is None or isinstance(given, str if isinstance(own, str) else bool | int | float | str)
    return "" if number or plain else f"{where} is a {type(given).__name__}"


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
                f"the state dict {what} {first_few(keys)}",
                where="load_state_dict",
                todo="give a state dict of this model, or strict=False; nothing was loaded",
            )

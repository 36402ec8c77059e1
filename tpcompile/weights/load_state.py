"""Loads an ordinary state dict, whole or of this rank's slices, into a sharded model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tpcompile.errors import TpCompileError
from tpcompile.ir.module_tensors import tensors_by_name

from .shard import cut

if TYPE_CHECKING:
    from tpcompile.runtime.runtime import Runtime


def local_state(
    module: nn.Module, runtime: Runtime, path: str, state: Mapping[str, Any], strict: bool
) -> Mapping[str, Any]:
    """A state dict as this rank loads it.

    Args:
        module: a sharded model, or a part of one.
        runtime: the model's.
        path: the module's path in the model.
        state: tensors by name, each whole or this rank's slice.
        strict: whether exactly the module's own keys must be there.

    Raises:
        TpCompileError: a key is missing or unexpected, or has another shape; nothing was changed.
    """
    own = module.state_dict(keep_vars=True)
    if strict:
        _check_keys(own, state)
    places = tensors_by_name(_root(module))
    names = {id(getattr(m, attribute)): name for name, (m, attribute) in places.items()}
    params = runtime.layout.params if runtime.layout is not None else {}
    found: Any = copy.copy(state)  # with its metadata, the versions of modules
    wrong = []
    for key, value in state.items():
        mine = own.get(key)
        if not isinstance(value, Tensor) or not isinstance(mine, Tensor) or value.shape == mine.shape:
            continue
        name = names.get(id(mine), "")
        whole = params[name].shape if name in params else tuple(mine.shape)
        if runtime.layout is None or whole != tuple(value.shape):
            wrong.append(f"{key}: {tuple(value.shape)} where the model has {whole}")
            continue
        custom = runtime.programs[0].compiled.planned.custom
        found[key] = cut(name, value, runtime.layout, runtime.compiler.rank, custom)
    if wrong:
        raise TpCompileError(
            f"tensors of another model: {'; '.join(wrong[:3])}" + _more(wrong),
            where=path or type(module).__name__,
            todo="give whole tensors, or this rank's slices; nothing was loaded",
        )
    result: Mapping[str, Any] = found
    return result


def _root(module: nn.Module) -> nn.Module:
    from tpcompile.runtime.watched_module import ENTRY

    guard = module.__dict__.get(ENTRY)
    root: nn.Module = module if guard is None else guard.root
    return root


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

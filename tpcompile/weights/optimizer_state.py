"""An optimizer's ordinary state: its sharded tensors gathered on one rank, or cut from whole ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.ranks.agree import compare
from tpcompile.ranks.describe import describe_value

from .load_state import own_parts
from .sharded_parameter import ShardedParameter
from .tensor_layout import gather


def whole_state(optimizer: torch.optim.Optimizer, to: int) -> dict[str, Any]:
    """What the state dict of an unsharded model's optimizer would be, in memory of the CPU.

    Args:
        optimizer: all ranks must call this with theirs.
        to: the rank that gets it; on the others sharded tensors are missing.
    """
    state: dict[str, Any] = optimizer.state_dict()
    whole = {at: {name: _whole(v, to) for name, v in values.items()} for at, values in state["state"].items()}
    return {**state, "state": whole}


def _whole(value: Any, to: int) -> Any:
    if not isinstance(value, ShardedParameter):
        return value.cpu() if isinstance(value, Tensor) else value
    local, where = value.to_local().detach(), value.placing
    if where.whole:
        return local.cpu() if where.rank == to else None
    return gather(local, where, to)


def parts_of_state(state: Mapping[Any, Any], params: Mapping[Any, Any]) -> dict[Any, Any]:
    """A state that an optimizer of sharded parameters is to load, as it holds it.

    Args:
        state: by parameter: whole tensors, or the parts that this rank has saved.
        params: the parameters.

    Raises:
        TpCompileError: a part is another rank's, or of another layout; ranks have other whole tensors.
    """
    sharded = {at: p.placing for at, p in params.items() if isinstance(p, ShardedParameter)}
    held = [(at, state[at]) for at in sharded if isinstance(state.get(at), Mapping)]
    lines = [f"{sharded[at].name}, {n}: {_described(v)}" for at, values in held for n, v in values.items()]
    if sharded:
        group = next(iter(sharded.values())).group
        compare(group, "states of an optimizer", lines, "load the same state on every rank")
    return {
        at: _parts(params.get(at), values) if isinstance(values, Mapping) else values
        for at, values in state.items()
    }


def _described(value: Any) -> str:
    """What ranks must have in common: of sharded tensors they hold their parts."""
    return describe_value(value if type(value) in (Tensor, nn.Parameter) else type(value))


def _parts(param: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    stored = own_parts(dict.fromkeys(values, param), values)
    if not isinstance(param, ShardedParameter):
        return {**values, **stored}
    return {name: stored.get(name, _part(param, value)) for name, value in values.items()}


def _part(param: ShardedParameter, value: Any) -> Any:
    """A tensor in memory of its own: what was loaded may be a file that is mapped, and written again."""
    if not isinstance(value, Tensor) or isinstance(value, ShardedParameter):
        return value
    if value.shape != param.shape or not value.ndim:
        return value.clone()
    part = param.part_of(value)
    part = part.clone() if part.data_ptr() == value.data_ptr() else part
    return ShardedParameter(part.to(param.to_local().device), param.placing)

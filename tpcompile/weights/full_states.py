"""torch's helpers that set whole states (``set_state_dict`` with ``full_state_dict`` or a broadcast).

They cut whole tensors as a ``DTensor``'s placements say. For a sharded parameter they hand on the whole one:
what loads it (``load_state_dict`` of the model, of an optimizer) checks, compares and cuts it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.distributed.checkpoint import state_dict

from tpcompile.ir.torch_internals import state_dict_utils

from .sharded_parameter import ShardedParameter


def tell_helpers() -> None:
    """Replaces the functions that cut."""
    utils: Any = state_dict_utils
    utils._distribute_tensors = functools.partial(_sent, utils._distribute_tensors)
    helpers: Any = state_dict
    helpers._distribute_state_dict = functools.partial(_given, helpers._distribute_state_dict)


def _sent(
    original: Callable[..., None], local_state: dict[str, Any], keys: list[str], *args: Any, **kwargs: Any
) -> None:
    """Whole tensors that rank 0 has sent: of each key the tensor to load into, and the whole one."""
    rest = []
    for key in keys:
        held = local_state.get(key)
        if isinstance(held, tuple) and isinstance(held[0], ShardedParameter):
            local_state[key] = held[1]
        else:
            rest.append(key)
    if rest:
        original(local_state, rest, *args, **kwargs)


def _given(
    original: Callable[..., None],
    full: dict[str, Any],
    local_state: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> None:
    """Whole tensors that every rank has."""
    sharded = {key for key, held in local_state.items() if isinstance(held, ShardedParameter)}
    original({key: value for key, value in full.items() if key not in sharded}, local_state, *args, **kwargs)
    local_state.update((key, full[key]) for key in sharded & full.keys())
    if sharded and not any(key.startswith("param_groups.") for key in local_state):
        # Of a model torch would take what is missing from the model itself, even where that is to be refused.
        for key in local_state.keys() - full.keys():
            del local_state[key]

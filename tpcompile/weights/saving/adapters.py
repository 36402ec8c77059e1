"""Adapters of a sharded model: PEFT's own code makes, writes and loads them, and sees whole tensors."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from tpcompile.errors import TpCompileError
from tpcompile.ranks.agree import together
from tpcompile.ranks.mesh_axis import MeshAxis
from tpcompile.weights.sharded_parameter import ShardedParameter

_COLLECT, _DIVIDE = "get_peft_model_state_dict", "_reshard_dtensor_values_for_load"
_SIZES = "_get_in_out_features"


def has_adapters(model: nn.Module) -> bool:
    """Whether a model is one of PEFT's, with another one in it."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def save_adapters(
    save: Callable[..., None],
    axis: MeshAxis | None,
    save_directory: str | os.PathLike[str],
    is_main_process: bool,
    options: Mapping[str, Any],
) -> None:
    """Writes what PEFT would write of an unsharded model; all ranks must call it.

    Args:
        save: PEFT's own ``save_pretrained``, of the model.
        axis: the mesh axis; None if the model is on one rank.
        save_directory: the folder.
        is_main_process: whether this rank may write; the first that may does.
        options: the other arguments that are not None.

    Raises:
        TpCompileError: on every rank; an argument is refused, or a rank has failed.
    """
    from .save_pretrained import SaveRequest, find_writer  # imports transformers

    if refused := options.keys() & {"state_dict", "push_to_hub"}:
        raise TpCompileError(
            f"the adapters of a sharded model are not saved with {', '.join(sorted(refused))}",
            where="save_pretrained",
            todo="leave it out: what is in the model is written to the folder",
        )
    group, rank = (None, 0) if axis is None else (axis.group, axis.rank)
    writer = find_writer(axis, SaveRequest(save_directory, is_main_process))
    together(
        group,
        "save the adapters",
        lambda: save(os.fspath(save_directory), is_main_process=rank == writer, **options),
    )


def tell_peft() -> None:
    """Has PEFT, if it is loaded, make and collect adapters whole; a sharded model divides them itself."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "peft":
            own = vars(module)
            wraps = (_COLLECT, _collects_whole), (_DIVIDE, _leaves_whole), (_SIZES, _finds_whole_sizes)
            for function, wrap in wraps:
                if function in own and not hasattr(own[function], "of_sharded"):
                    setattr(module, function, wrap(own[function]))


@functools.cache
def _collects_whole(collect: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collect)
    def run(*args: Any, **kwargs: Any) -> dict[str, Any]:
        found = collect(*args, **kwargs)
        return {name: t.full_tensor() if isinstance(t, ShardedParameter) else t for name, t in found.items()}

    run.of_sharded = True  # type: ignore[attr-defined]
    return run


@functools.cache
def _leaves_whole(divide: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(divide)
    def run(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {name for name, p in model.named_parameters() if isinstance(p, ShardedParameter)}
        others: dict[str, Tensor] = divide(model, {n: t for n, t in state_dict.items() if n not in own})
        return {**others, **{n: t for n, t in state_dict.items() if n in own}}

    run.of_sharded = True  # type: ignore[attr-defined]
    return run


@functools.cache
def _finds_whole_sizes(sizes: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(sizes)
    def run(module: nn.Module) -> Any:
        # Of a DTensor on a mesh with names PEFT takes the part's, as for modules that compute with parts.
        if isinstance(module, nn.Linear) and isinstance(module.weight, ShardedParameter):
            return module.in_features, module.out_features
        return sizes(module)

    run.of_sharded = True  # type: ignore[attr-defined]
    return run

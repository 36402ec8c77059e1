"""A sharded model's weights and optimizer state, for ``torch.distributed.checkpoint`` (DCP).

    dcp.save(model.sharded_state_dict(), checkpoint_id=folder)
    checkpoint.load(model.sharded_state_dict(), checkpoint_id=folder)     # dcp.load with errors that say more

A ``ShardedParameter`` tells DCP which boxes of the whole this rank holds. Nothing in a checkpoint depends on
the number of ranks, so that it can be loaded at any, and by the model that is not sharded. torch's own
``get_state_dict`` and ``set_state_dict`` give the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor

from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.check import checked
from tpcompile.ir.names import first_few
from tpcompile.ir.torch_internals import flatten_state_dict, storage_setup
from tpcompile.ranks.agree import together

from .load_state import unlike
from .sharded_parameter import ShardedParameter


@checked
def sharded_state_dict(model: nn.Module, tied: bool = True) -> dict[str, Any]:
    """The entries of ``model.state_dict()``, for DCP.

    Args:
        model: a sharded model.
        tied: whether a tied parameter comes under each of its names, or only under the first.
    """
    seen: set[int] = set()
    found: dict[str, Any] = {}
    for key, value in nn.Module.state_dict(model, keep_vars=True).items():
        if tied or id(value) not in seen:
            seen.add(id(value))
            found[key] = value.detach() if isinstance(value, Tensor) else value
    return found


@checked
def sharded_optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state by names of parameters, as ``get_optimizer_state_dict`` of torch gives it.

    An optimizer that has taken no step yet gets its state by one with zero gradients and a zero learning
    rate, as torch does it, so that there is something to load into.
    """
    with _without_gradients(optimizer):
        state: dict[str, Any] = get_optimizer_state_dict(_unwrapped(model), optimizer)
    return state


@checked
def load_sharded_optimizer_state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Gives an optimizer a state as ``sharded_optimizer_state_dict`` made it, once it has been loaded.

    All ranks must call it.

    Raises:
        TpCompileError: on every rank, and the optimizer is as it was: the state is another optimizer's.
    """
    inner, had = _unwrapped(model), bool(optimizer.state)
    with _without_gradients(optimizer):
        own = get_optimizer_state_dict(inner, optimizer)
        try:
            together(_group_of(inner), "check the optimizer's state", lambda: _check_optimizer(own, state))
        except TpCompileError:
            if not had:
                optimizer.state.clear()  # what was made to compare with
            raise
        set_optimizer_state_dict(inner, optimizer, dict(state))


def _check_optimizer(own: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    if unfit := unlike(own, state, "the state"):
        raise TpCompileError(
            f"{unfit}; it is not this optimizer's",
            where="load_sharded_optimizer_state_dict",
            todo="give what sharded_optimizer_state_dict has made of this optimizer; nothing was loaded",
        )


def _group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The ranks that share a model; None if FSDP has made something else of its parameters."""
    groups = (p.placing.axis.group for p in model.parameters() if isinstance(p, ShardedParameter))
    return next(groups, None)


def _unwrapped(model: nn.Module) -> nn.Module:
    """A sharded model without the wrapper of ``torch.compile``."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    if not any(isinstance(p, DTensor) for p in inner.parameters()):
        raise TpCompileError(
            f"{type(model).__name__} is not sharded",
            where="checkpoint",
            todo="give the model that parallelize returned",
        )
    return inner


@contextmanager
def _without_gradients(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Hides gradients: with them torch does not initialise an optimizer's state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [p.grad for p in params]
    for param in params:
        param.grad = None
    try:
        yield
    finally:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad


@checked
def load(
    state_dict: dict[str, Any],
    *,
    checkpoint_id: str | os.PathLike[str] | None = None,
    storage_reader: StorageReader | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Loads a checkpoint in place, as ``torch.distributed.checkpoint.load``, but checks it first.

    The checkpoint may come from any number of ranks, or from a model that is not sharded. A tied parameter
    needs to be there under one of its names only. All ranks must call it.

    Raises:
        TpCompileError: on every rank; before anything is loaded: there is no checkpoint, it lacks a key, or
            has one in another shape; or a file of it is damaged.
    """
    group = process_group
    if group is None and dist.is_initialized():
        group = dist.group.WORLD
    reader: Any = together(group, "open the checkpoint", lambda: _reader(storage_reader, checkpoint_id))
    flat, _ = flatten_state_dict(state_dict)
    together(group, "check the checkpoint", lambda: check(flat, _metadata(reader, checkpoint_id)))
    planner = DefaultLoadPlanner(allow_partial_load=True)  # what may be missing was checked
    try:
        dcp_load(state_dict, storage_reader=reader, planner=planner, process_group=process_group)
    except CheckpointException as error:  # the same on every rank
        first = next(iter(error.failures.values()))[0]
        raise TpCompileError(
            f"the checkpoint's files cannot be read: {first}",
            where=repr(checkpoint_id),
            todo="copy or save it again; some of the tensors may have been loaded",
        ) from error


def _reader(reader: StorageReader | None, checkpoint_id: str | os.PathLike[str] | None) -> Any:
    with refusing("no checkpoint to load", where=repr(checkpoint_id), todo="give checkpoint_id"):
        return storage_setup(reader, checkpoint_id, reader=True)


def _metadata(reader: Any, checkpoint_id: str | os.PathLike[str] | None) -> Metadata:
    todo = "give the folder that torch.distributed.checkpoint.save was given"
    with refusing("the checkpoint cannot be read", where=repr(checkpoint_id), todo=todo):
        metadata: Metadata = reader.read_metadata()
        return metadata


def check(state: Mapping[str, Any], metadata: Metadata) -> None:
    """Whether a checkpoint has all that is to be loaded.

    Raises:
        TpCompileError: it lacks a key, or has one in another shape; the message names the first few.
    """
    saved = metadata.state_dict_metadata
    there = {id(value) for key, value in state.items() if key in saved and isinstance(value, Tensor)}
    missing = [key for key, value in state.items() if key not in saved and id(value) not in there]
    if missing:
        _refuse("the checkpoint lacks", missing)
    here = {key: value for key, value in state.items() if key in saved}
    kinds = [
        k for k, v in here.items() if isinstance(v, Tensor) != isinstance(saved[k], TensorStorageMetadata)
    ]
    if kinds:
        _refuse("the checkpoint has something else than the model in", kinds)
    wrong = [
        f"{key} ({tuple(entry.size)} where the model has {tuple(value.shape)})"
        for key, value in here.items()
        if isinstance(entry := saved[key], TensorStorageMetadata) and entry.size != value.shape
    ]
    if wrong:
        _refuse("the checkpoint has other shapes in", wrong)


def _refuse(what: str, keys: list[str]) -> NoReturn:
    raise TpCompileError(
        f"{what} {first_few(keys)}",
        where="checkpoint",
        todo="load a checkpoint of this model; nothing was loaded",
    )

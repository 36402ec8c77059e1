"""A sharded model's weights and optimizer state, for ``torch.distributed.checkpoint`` (DCP).

    dcp.save(model.sharded_state_dict(), checkpoint_id=folder)
    checkpoint.load(model.sharded_state_dict(), checkpoint_id=folder)     # dcp.load with errors that say more

A value is a ``SliceTensor``: it has the whole parameter's shape, and tells DCP, through the protocol of
``torch.distributed._checkpointable``, which boxes of the whole this rank holds. Nothing in a checkpoint
depends on the number of ranks, so that it can be loaded at any, and by the model that is not sharded.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint._storage_utils import _storage_setup
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from tpcompile.errors import TpCompileError
from tpcompile.ir.layout.index_ranges import copied_along
from tpcompile.ir.layout.weight_layout import ParamLayout, WeightLayout
from tpcompile.ir.module_tensors import tensors_by_name
from tpcompile.ranks.agree import together
from tpcompile.runtime.runtime import Runtime

from .slice_tensor import SliceTensor

# A part of a parameter: its name, and the axes of the mesh along which ranks hold the same.
Part = tuple[str, tuple[int, ...]]


def parts_written(layout: WeightLayout, rank: int) -> frozenset[Part]:
    """The parts that a rank saves: of ranks that hold the same one does, the one that saves the fewest bytes.

    Every rank computes the same assignment; the largest parts are assigned first.
    """
    load = [0] * layout.ranks
    shared: list[tuple[int, Part, list[int]]] = []
    written = set()
    for name, param in layout.params.items():
        for copies in {copied_along(s, layout.axes): None for s in param.segments}:
            for holders in _holders(layout, copies):
                size = _part_bytes(layout, param, copies, holders[0])
                if len(holders) > 1:
                    shared.append((size, (name, copies), holders))
                else:
                    load[holders[0]] += size
                    written |= {(name, copies)} if holders[0] == rank else set()
    for size, part, holders in sorted(shared, key=lambda s: -s[0]):
        writer = min(holders, key=lambda r: load[r])
        load[writer] += size
        written |= {part} if writer == rank else set()
    return frozenset(written)


def _holders(layout: WeightLayout, copies: tuple[int, ...]) -> list[list[int]]:
    """Ranks grouped by equal coordinates on all axes but those."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.ranks):
        key = tuple(c for axis, c in enumerate(layout.coordinates(rank)) if axis not in copies)
        groups.setdefault(key, []).append(rank)
    return list(groups.values())


def _part_bytes(layout: WeightLayout, param: ParamLayout, copies: tuple[int, ...], rank: int) -> int:
    boxes = layout.boxes(param.name, rank)
    held = [s.local_shape(box) for s, box in boxes if copied_along(s, layout.axes) == copies]
    return sum(map(math.prod, held)) * param.dtype.itemsize


class Wrapper:
    """Wraps a rank's local tensors by the layout of the parameter that they lie like.

    Args:
        layout: where the weights lie.
        rank: this rank.
    """

    def __init__(self, layout: WeightLayout, rank: int) -> None:
        self.layout, self.rank = layout, rank
        self.parts = parts_written(layout, rank)

    def wrap(self, name: str, local: Tensor) -> SliceTensor:
        """A local tensor as the slice of a whole one.

        Raises:
            TpCompileError: the tensor is not this rank's slice of the parameter.
        """
        expected = self.layout.local_shape(name, self.rank)
        if isinstance(local, DTensor) or local.is_meta or tuple(local.shape) != expected:
            kind = "a DTensor" if isinstance(local, DTensor) else f"{tuple(local.shape)} on {local.device}"
            raise TpCompileError(
                f"the local tensor is {kind}, the layout has {expected} for this rank",
                where=name,
                todo="keep the parameters as tpcompile made them",
            )
        regions = self.layout.regions(name, self.rank)
        whole = 0 in self.layout.params[name].shape
        written = frozenset(r.offsets for r in regions if whole or (name, r.copies) in self.parts)
        return SliceTensor(self.layout.params[name].shape, local.detach(), regions, written)


def sharded_state_dict(model: nn.Module, runtime: Runtime, tied: bool = True) -> dict[str, Any]:
    """The entries of ``model.state_dict()``, parameters and buffers as slices of whole ones.

    Args:
        model: a sharded model.
        runtime: its runtime.
        tied: whether a tied parameter comes under each of its names, or only under the first.
    """
    state = nn.Module.state_dict(model, keep_vars=True)
    if runtime.layout is None:
        return {k: v.detach() if isinstance(v, Tensor) else v for k, v in state.items()}
    names = _names(model)
    wrapper = Wrapper(runtime.layout, runtime.compiler.rank)
    wrapped: dict[str, SliceTensor] = {}
    found: dict[str, Any] = {}
    for key, value in state.items():
        name = names.get(id(value))
        if name is None or name not in runtime.layout.params:
            found[key] = value.detach() if isinstance(value, Tensor) else value
        elif name not in wrapped:
            found[key] = wrapped[name] = wrapper.wrap(name, value)
        elif tied:
            found[key] = wrapped[name]
    return found


def _names(model: nn.Module) -> dict[int, str]:
    """The name in the layout of every parameter and buffer, by identity."""
    return {id(getattr(m, attribute)): name for name, (m, attribute) in tensors_by_name(model).items()}


def sharded_optimizer_state_dict(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state by names of parameters, as ``get_optimizer_state_dict`` of torch gives it.

    Tensors in the shape of their parameter are slices of whole ones, scalars stay as they are. An optimizer
    that has taken no step yet gets its state by one with zero gradients and a zero learning rate, as torch
    does it, so that there is something to load into.

    Raises:
        TpCompileError: a divided parameter has state of another shape: how it is divided isn't known.
    """
    model, runtime = _sharded(model)
    with _without_gradients(optimizer):
        state: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    if runtime.layout is None:
        return state
    wrapper, params = Wrapper(runtime.layout, runtime.compiler.rank), dict(model.named_parameters())
    state["state"] = {
        key: {what: _wrap_state(wrapper, key, params[key], what, value) for what, value in entry.items()}
        for key, entry in state["state"].items()
    }
    return state


def _wrap_state(wrapper: Wrapper, name: str, param: Tensor, what: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.shape == param.shape:
        return wrapper.wrap(name, value)
    if value.ndim == 0 or tuple(param.shape) == wrapper.layout.params[name].shape:
        return value
    raise TpCompileError(
        f"the optimizer's {what} has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}",
        where=name,
        todo="use an optimizer whose state is shaped like its parameters",
    )


def load_sharded_optimizer_state_dict(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Gives an optimizer a state as ``sharded_optimizer_state_dict`` made it, once it has been loaded."""
    model, _ = _sharded(model)
    plain = tree_map_only(SliceTensor, lambda s: s.local, dict(state))
    with _without_gradients(optimizer):
        set_optimizer_state_dict(model, optimizer, plain)


def _sharded(model: nn.Module) -> tuple[nn.Module, Runtime]:
    """A sharded model without the wrapper of ``torch.compile``, and its runtime."""
    inner = getattr(model, "_orig_mod", model)
    runtime = getattr(inner, "_tp", None)
    if not isinstance(runtime, Runtime):
        raise TpCompileError(
            f"{type(model).__name__} is not sharded", todo="give the model that parallelize returned"
        )
    return inner, runtime


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
        TpCompileError: on every rank, before anything is loaded: there is no checkpoint, it lacks a key, or
            has one in another shape.
    """
    group = process_group
    if group is None and dist.is_initialized():
        group = dist.group.WORLD
    reader: Any = together(group, "open the checkpoint", lambda: _reader(storage_reader, checkpoint_id))
    flat, _ = flatten_state_dict(state_dict)
    together(group, "check the checkpoint", lambda: check(flat, _metadata(reader, checkpoint_id)))
    planner = DefaultLoadPlanner(allow_partial_load=True)  # what may be missing was checked
    dcp_load(state_dict, storage_reader=reader, planner=planner, process_group=process_group)


def _reader(reader: StorageReader | None, checkpoint_id: str | os.PathLike[str] | None) -> Any:
    try:
        return _storage_setup(reader, checkpoint_id, reader=True)
    except RuntimeError as error:
        raise TpCompileError(
            f"no checkpoint to load: {error}", where=str(checkpoint_id), todo="give checkpoint_id"
        ) from error


def _metadata(reader: Any, checkpoint_id: str | os.PathLike[str] | None) -> Metadata:
    try:
        metadata: Metadata = reader.read_metadata()
    except Exception as error:
        raise TpCompileError(
            f"the checkpoint cannot be read: {error}",
            where=str(checkpoint_id),
            todo="give the folder that torch.distributed.checkpoint.save was given",
        ) from error
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
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    raise TpCompileError(
        f"{what} {', '.join(keys[:3])}{more}", todo="load a checkpoint of this model; nothing was loaded"
    )

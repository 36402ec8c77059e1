"""Writes a sharded model as an ordinary checkpoint of transformers, without any rank holding the model."""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel

from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.check import check_arguments
from tpcompile.ir.hf_internals import custom_object_save, revert_weight_conversion
from tpcompile.ir.unwrap import joined
from tpcompile.ranks.agree import together
from tpcompile.ranks.mesh_axis import MeshAxis
from tpcompile.weights.loading.expressions import Expression, Leaf, leaves
from tpcompile.weights.loading.fill_tensor import Filler
from tpcompile.weights.loading.find_files import INDEX, Variant, variant_of
from tpcompile.weights.loading.keep_blocks import kept_by
from tpcompile.weights.loading.lazy_tensor import LazyTensor
from tpcompile.weights.shard import unsharded

from .collect_tensors import Collector, leaves_of
from .plan_files import File, index_text, plan_files, size_in_bytes
from .quantised_metadata import quantised_metadata
from .replicas import refuse_other_models
from .staged_checkpoint import StagedCheckpoint, refusal


@dataclass(frozen=True)
class SaveRequest:
    """Arguments of transformers' ``save_pretrained``; see there.

    Attributes:
        save_directory: where to; what it holds beside a checkpoint stays.
        is_main_process: whether this rank may write.
        max_shard_size: the size of a file.
        variant: of the weights.
        save_original_format: whether keys and tensors get the form back that they were loaded from.
        refused: arguments that mean nothing for a sharded model, as given.
    """

    save_directory: str | os.PathLike[str]
    is_main_process: bool = True
    max_shard_size: int | str = "50GB"
    variant: Variant | None = None
    save_original_format: bool = True
    refused: Mapping[str, Any] | None = None


_REFUSED = {
    "safe_serialization": "leave it out: weights are written as safetensors",
    "state_dict": "leave it out; full_state_dict() gives one that can be written by hand",
    "push_to_hub": "save to a folder, and upload that",
    "distributed_checkpoint": "use torch.distributed.checkpoint with sharded_state_dict()",
}


def save_pretrained(model: Any, axis: MeshAxis | None, original: type, wishes: SaveRequest) -> None:
    """Writes a checkpoint that transformers, and ``tpcompile.from_pretrained`` at any size, can load.

    One rank writes; it holds one whole parameter (or one converted tensor's parameters) at a time. The
    checkpoint is written to a subfolder, and moved to its place when it is complete.

    Args:
        model: a sharded model of transformers.
        axis: the mesh axis; None if the model is on one rank.
        original: the model's class before it was sharded.
        wishes: arguments.

    Raises:
        TpCompileError: on every rank; what was there before is still there.
    """
    group, everyone = _group(axis), None if axis is None else axis.everyone
    prepared = together(group, "prepare the checkpoint", lambda: _prepare(model, axis, original, wishes))
    refuse_other_models(model, axis, "save_pretrained")
    together(everyone, "save the model", lambda: _save(model, axis, *prepared, wishes))


def _prepare(
    model: Any, axis: MeshAxis | None, original: type, wishes: SaveRequest
) -> tuple[Path, list[File], dict[str, bytes]]:
    """Checks what can be checked; gives the folder, the files of weights, the contents of all others."""
    if not isinstance(model, PreTrainedModel):
        raise TpCompileError(
            f"{type(model).__name__} is not a model of transformers",
            where="save_pretrained",
            todo="write full_state_dict(), or use torch.distributed.checkpoint with sharded_state_dict()",
        )
    check_arguments(SaveRequest, vars(wishes), "save_pretrained")
    for name, value in (wishes.refused or {}).items():
        asked = value is False if name == "safe_serialization" else value is not None and value is not False
        if asked:
            todo = _REFUSED.get(name, "leave it out")
            raise TpCompileError(f"a sharded model is not saved with {name}", where="arguments", todo=todo)
    if getattr(model, "_hf_peft_config_loaded", False):
        raise TpCompileError(
            "the model has adapters",
            where="save_pretrained",
            todo="save them from the model before it was sharded, or merge them",
        )
    target = _folder(wishes.save_directory)
    Collector(model, 0 if axis is None else axis.rank, 0).check()
    metadata = quantised_metadata(model, original)
    tensors, parameters = _tensors(model, original, wishes.save_original_format)
    files = plan_files(tensors, size_in_bytes(wishes.max_shard_size), wishes.variant, metadata)
    others = _configs(model)
    if len(files) > 1:
        others[variant_of(INDEX, wishes.variant)] = index_text(files, parameters).encode()
    return target, files, others


def _folder(path: str | os.PathLike[str]) -> Path:
    where = f"save_directory: {path!r}"
    if not os.fspath(path):
        raise TpCompileError("the name of the folder is empty", where=where, todo="give a folder")
    with refusing("no folder can be there", where=where, todo="give another one"):
        folder = Path(os.path.realpath(path))
        if folder.exists() and not folder.is_dir():
            raise TpCompileError("there is a file of this name", where=where, todo="give a folder")
    return folder


def _tensors(model: Any, original: type, original_format: bool) -> tuple[dict[str, Expression], int]:
    """The checkpoint's tensors by key, as expressions over parameters; how many numbers those have."""
    found = leaves_of(model)
    ignored = set(model._keys_to_ignore_on_save or ())
    lazy: dict[str, Any] = {key: LazyTensor(leaf) for key, leaf in found.items() if key not in ignored}
    kept = kept_by(getattr(model, "hf_quantizer", None))
    if kept is not None:
        if not original_format:
            raise TpCompileError(
                "weights in fp8 blocks or MXFP4 are written in the form that they were read in, and no other",
                where="save_original_format",
                todo="leave it out",
            )
        lazy = joined(model, lazy)
    with unsharded(model, original):
        parameters: int = model.num_parameters()
        if original_format:
            lazy = revert_weight_conversion(model, lazy)
    if kept is not None:
        lazy = {key: part for name, weight in lazy.items() for key, part in kept.stored(name, weight).items()}
    return {key: value.expression for key, value in lazy.items()}, parameters


def find_writer(axis: MeshAxis | None, wishes: SaveRequest) -> int | None:
    """The rank of the group that writes; None if another replica of the model does.

    Raises:
        TpCompileError: no rank may.
    """
    group = _group(axis)
    flags: list[Any] = [bool(wishes.is_main_process)]
    if group is not None:
        flags = [None] * dist.get_world_size(group)
        dist.all_gather_object(flags, bool(wishes.is_main_process), group=group)
    if axis is not None and axis.replica != 0:
        return None
    if not any(flags):
        raise TpCompileError(
            "no rank may write", where="is_main_process", todo="give is_main_process=True on one rank"
        )
    return flags.index(True)


def _group(axis: MeshAxis | None) -> dist.ProcessGroup | None:
    return None if axis is None else axis.group


def _save(
    model: Any,
    axis: MeshAxis | None,
    target: Path,
    files: list[File],
    others: dict[str, bytes],
    wishes: SaveRequest,
) -> None:
    writer = find_writer(axis, wishes)
    if writer is None:
        return
    group, rank = _group(axis), 0 if axis is None else axis.rank
    collector = Collector(model, rank, writer)
    stage = StagedCheckpoint(target, files, others, wishes.variant) if rank == writer else None
    with stage or contextlib.nullcontext():
        together(group, "make a folder", lambda: None if stage is None else stage.begin())
        for file in files:
            path = None if stage is None else stage.path / file.name
            together(group, f"write {file.name}", lambda f=file, p=path: _write(f, p, collector))  # type: ignore[misc]
        together(group, "finish the checkpoint", lambda: None if stage is None else stage.finish())


def _write(file: File, path: Path | None, collector: Collector) -> None:
    """Writes a file, tensor by tensor. Whatever happens, every rank takes part in every collection."""
    failure: Exception | None = None
    handle = None
    try:
        if path is not None:
            handle = open(path, "wb")  # noqa: SIM115
            handle.write(file.header())
    except OSError as error:
        failure = error
    for tensor in file.tensors.values():
        try:
            whole = collector.collect(leaves(tensor))
            if handle is not None and failure is None:
                handle.write(_bytes(tensor, whole))
        except Exception as error:
            failure = failure or error
    try:
        if handle is not None:
            with handle:
                handle.flush()
                os.fsync(handle.fileno())
    except OSError as error:
        failure = failure or error
    if isinstance(failure, OSError):
        raise refusal(failure, str(path)) from failure
    if failure is not None:
        raise failure


def _bytes(tensor: Expression, whole: Mapping[str, Tensor | None]) -> memoryview:
    def read(leaf: Leaf) -> Tensor:
        found = whole[leaf.name]
        assert found is not None, "this rank collects"
        return found

    with torch.no_grad():
        value = Filler(read).whole(tensor).contiguous()
    return value.reshape(-1).view(torch.uint8).numpy().data


def _configs(model: Any) -> dict[str, bytes]:
    """The files beside the weights, as transformers writes them.

    Raises:
        TpCompileError: transformers refuses a configuration.
    """
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    todo = "correct model.config or model.generation_config"
    where = type(model).__name__
    with (
        tempfile.TemporaryDirectory() as folder,
        refusing("its files cannot be made", where=where, todo=todo),
    ):
        if model.is_remote_code():
            custom_object_save(model, folder, config=config)
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

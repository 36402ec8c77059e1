"""Training arguments that ask for what cannot be done with a sharded model."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tpcompile.errors import TpCompileError
from tpcompile.ranks.mesh_axis import MeshAxis

_REFUSED = {
    "fsdp": ("FSDP would divide the model over the ranks that share it", "leave it out"),
    "deepspeed": ("DeepSpeed would divide the model over the ranks that share it", "leave it out"),
    "auto_find_batch_size": (
        "a rank that has run out of memory would go on with smaller batches than the others",
        "set per_device_train_batch_size",
    ),
    "save_on_each_node": ("one rank writes the checkpoint", "give a folder that all machines share"),
    "use_liger_kernel": (
        "its kernels would replace layers whose weights are divided",
        "replace them before parallelize",
    ),
    "torch_compile": (
        "the model's programs are compiled one by one",
        "give compile=True to parallelize",
    ),
    "neftune_noise_alpha": ("its noise would be random numbers of the ranks' own", "leave it out"),
}


def refuse_arguments(args: Any, axis: MeshAxis, device: torch.device) -> None:
    """Refuses what would be wrong, or wait forever.

    Args:
        args: ``TrainingArguments``.
        axis: the ranks that share the model.
        device: where this rank's part is.

    Raises:
        TpCompileError: see the message; nothing was changed.
    """
    for name, (what, todo) in _REFUSED.items():
        if getattr(args, name, None):
            raise TpCompileError(what, where=f"TrainingArguments({name}={getattr(args, name)!r})", todo=todo)
    if args.accelerator_config.dispatch_batches:
        raise TpCompileError(
            "the first process would divide its batches among the ranks that share the model",
            where="TrainingArguments(accelerator_config={'dispatch_batches': True})",
            todo="leave it out: every rank reads the data itself",
        )
    ranks = len(axis.rows[0])
    if ranks != dist.get_world_size():
        raise TpCompileError(
            f"{ranks} of {dist.get_world_size()} processes share the model: Trainer would give the others "
            "the same data",
            where="the mesh",
            todo=f"start {ranks} processes; for data parallelism around it, write the loop (see the "
            "documentation of training)",
        )
    if args.device.type != device.type or (args.device.index or 0) != (device.index or 0):
        raise TpCompileError(
            f"Trainer is on {args.device}, this rank's part of the model on {device}",
            where="TrainingArguments",
            todo="start the processes with torchrun, which tells each its device",
        )

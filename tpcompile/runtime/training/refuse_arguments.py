"""Training arguments that ask for what cannot be done with a sharded model."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import DistributedType
from accelerate.utils import operations
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

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


_OVER_ALL = (
    operations.broadcast,
    operations.broadcast_object_list,
    operations.gather,
    operations.gather_object,
    operations.pad_across_processes,
    operations.reduce,
)
"""accelerate's functions that take all processes for those of a trainer."""


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
    if args.optim in ("lomo", "adalomo"):
        raise TpCompileError(
            "it averages gradients over all processes, and updates weights while backward runs",
            where=f"TrainingArguments(optim={str(args.optim)!r})",
            todo="take another optimizer",
        )
    if args.accelerator_config.dispatch_batches:
        raise TpCompileError(
            "the first process would divide its batches among the ranks that share the model",
            where="TrainingArguments(accelerator_config={'dispatch_batches': True})",
            todo="leave it out: every rank reads the data itself",
        )
    ranks = sum(map(len, axis.rows))
    if ranks != dist.get_world_size():
        raise TpCompileError(
            f"{ranks} of {dist.get_world_size()} processes are in the mesh: Trainer would give the others "
            "the same data",
            where="the mesh",
            todo=f"start {ranks} processes; to train on several batches at a time, give parallelize the mesh "
            "of all processes, and the axis of it that shares the model: "
            "init_device_mesh(..., mesh_dim_names=('dp', 'tp')), axis='tp'",
        )
    if len(axis.rows) > 1 and args.distributed_state.distributed_type == DistributedType.NO:
        raise TpCompileError(
            "accelerate knows of no other processes, and would not have them draw the same order of the data",
            where="TrainingArguments",
            todo="start the processes with torchrun before the arguments are made",
        )
    if args.device.type != device.type or (args.device.index or 0) != (device.index or 0):
        raise TpCompileError(
            f"Trainer is on {args.device}, this rank's part of the model on {device}",
            where="TrainingArguments",
            todo="start the processes with torchrun, which tells each its device",
        )


def refuse_own_gathers(trainer: type, axis: MeshAxis) -> None:
    """Refuses a trainer whose code gathers over all processes, not over those of its accelerator.

    TRL's trainers that sample (GRPO, RLOO) do: each data rank would take the rows of another one for its own.

    Args:
        trainer: its class.
        axis: the ranks that share the model.

    Raises:
        TpCompileError: it is so, and there are several data ranks.
    """
    if len(axis.rows) == 1:
        return
    modules = {kind.__module__: vars(sys.modules[kind.__module__]) for kind in trainer.__mro__}
    for name, function in ((n, f) for n in modules for f in modules[n].values()):
        if any(function is known for known in _OVER_ALL):
            raise TpCompileError(
                f"{name} gathers over all processes (accelerate's {function.__name__}), also over those that "
                "share a model",
                where=trainer.__name__,
                todo="share the model over all processes, so that there is one batch at a time; or have the "
                "trainer call its accelerator's methods, such as self.accelerator.gather",
            )


def refuse_wrapped(model: nn.Module) -> None:
    """Refuses a model whose gradients data parallelism has in hand already.

    Raises:
        TpCompileError: it is so.
    """
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel | FSDPModule):
            raise TpCompileError(
                "data parallelism around the model, or in it, would be done twice",
                where=name or type(model).__name__,
                todo="give Trainer the sharded model itself; it averages gradients over the other axes",
            )

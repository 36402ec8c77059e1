"""The mesh that a model is divided over: by default all processes; checked; and this rank's device in it."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.check import short

Axis = str | tuple[str, ...]
"""The name of a mesh's axis; or names of several, in the mesh's order, that are used as one."""


def default_mesh(device: str | None = None) -> DeviceMesh:
    """One axis over all processes, which are connected first if torchrun started them.

    Args:
        device: the type of device that the model is on; None: accelerators, if there are any that the process
            group can use, else CPUs.

    Raises:
        TpCompileError: there is no process group and no torchrun.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        usable = not dist.is_initialized() or "gloo" not in dist.get_backend()
        device = accelerator.type if accelerator is not None and usable else "cpu"
    if not dist.is_initialized():
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise TpCompileError(
                "there is no process group",
                where="mesh",
                todo="start the program with torchrun, or call torch.distributed.init_process_group",
            )
        if device != "cpu":
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(dist.get_default_backend_for_device(device))
    return init_device_mesh(device, (dist.get_world_size(),))


def check_mesh(mesh: Any, axis: Any, *, connected: bool = True) -> int:
    """The size of the axis to divide over.

    Args:
        mesh: the mesh that the user gave.
        axis: the name of one of its axes, or a tuple of several; needed if it has several.
        connected: whether this rank is to talk to the others, not only to know how many they are.

    Raises:
        TpCompileError: it is not a mesh, has no such axis, or this rank cannot talk over it.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TpCompileError(
            f"{short(mesh)} is not a DeviceMesh", where="mesh", todo="use torch's init_device_mesh"
        )
    names = mesh.mesh_dim_names or ()
    where = f"axes {names}"
    wanted = axis if isinstance(axis, tuple) else (axis,)
    if axis is not None and not (wanted and all(isinstance(name, str) and name in names for name in wanted)):
        todo = "name one of its axes, or several in a tuple"
        raise TpCompileError(f"the mesh has no axis {short(axis)}", where=where, todo=todo)
    if axis is None and mesh.ndim != 1:
        todo = "give axis=, one of them or a tuple of several; or one axis of it: mesh['tp']"
        raise TpCompileError(f"the mesh has {mesh.ndim} axes", where=where, todo=todo)
    ordered = tuple(name for name in names if name in wanted)
    if axis is not None and wanted != ordered:
        # Ranks are counted along the axes as the mesh has them, the last one quickest.
        what = f"{short(axis)} are not the mesh's axes in its order"
        raise TpCompileError(what, where=where, todo=f"give axis={ordered}, or make the mesh in that order")
    if connected:
        _check_connected(mesh, ordered)
    return math.prod(mesh.size(names.index(name)) for name in ordered) if ordered else mesh.size()


def _check_connected(mesh: DeviceMesh, axes: tuple[str, ...]) -> None:
    ranks = f"ranks {mesh.mesh.flatten().tolist()}"
    if not dist.is_initialized():
        raise TpCompileError(
            "there is no process group", where="mesh", todo="call torch.distributed.init_process_group first"
        )
    if int(mesh.mesh.max()) >= dist.get_world_size():
        raise TpCompileError(
            f"the mesh names rank {int(mesh.mesh.max())}, the world has {dist.get_world_size()} processes",
            where=ranks,
            todo="start more processes, or make a smaller mesh",
        )
    if mesh.get_coordinate() is None:
        raise TpCompileError(
            f"rank {dist.get_rank()} is not part of the mesh",
            where=ranks,
            todo="call this on the ranks of the mesh only",
        )
    todo = "make it with init_device_mesh, after init_process_group"
    with refusing("the mesh has no process groups, or not any more", where=ranks, todo=todo):
        for axis in axes or (None,):
            dist.get_world_size(mesh.get_group(axis))


def local_device(device_type: str) -> torch.device:
    """This rank's device of a type."""
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, torch.accelerator.current_device_index())

"""The mesh that a model is divided over: by default all processes; checked; and this rank's device in it."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tpcompile.errors import TpCompileError


def default_mesh(model: nn.Module | None = None) -> DeviceMesh:
    """One axis over all processes.

    Args:
        model: the mesh is for its device. Without one it is for accelerators where there are any, else for
            CPUs, and processes that torchrun started are connected first.

    Raises:
        TpCompileError: there is no process group.
    """
    if model is not None:
        if not dist.is_initialized():
            raise TpCompileError(
                "there is no process group",
                todo="call torch.distributed.init_process_group, or give a mesh",
            )
        on_cuda = next((p.device.type for p in model.parameters()), "cpu") == "cuda"
        return init_device_mesh("cuda" if on_cuda else "cpu", (dist.get_world_size(),))
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if not dist.is_initialized():
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
            raise TpCompileError(
                "there is no process group",
                todo="start the program with torchrun, or call torch.distributed.init_process_group",
            )
        if accelerator is not None:
            torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group(
            "gloo" if accelerator is None else dist.get_default_backend_for_device(accelerator)
        )
    device = "cpu"
    if accelerator is not None and "gloo" not in dist.get_backend():
        device = accelerator.type
    return init_device_mesh(device, (dist.get_world_size(),))


def check_mesh(mesh: DeviceMesh, axis: str | None) -> int:
    """The size of the axis to divide over.

    Args:
        mesh: the mesh that the user gave.
        axis: the name of one of its axes; needed if it has several.

    Raises:
        TpCompileError: it is no mesh, has no such axis, or this rank is not in it.
    """
    if not isinstance(mesh, DeviceMesh):
        raise TpCompileError(
            f"{mesh!r} is no DeviceMesh", todo="use torch.distributed.device_mesh.init_device_mesh"
        )
    names = mesh.mesh_dim_names or ()
    if axis is not None and axis not in names:
        raise TpCompileError(
            f"the mesh has no axis {axis!r}", where=f"axes {names}", todo="name one of its axes"
        )
    if axis is None and mesh.ndim != 1:
        raise TpCompileError(
            f"the mesh has {mesh.ndim} axes",
            where=f"axes {names}",
            todo="give axis=, or one axis of it: mesh['tp']",
        )
    if dist.is_initialized() and int(mesh.mesh.max()) >= dist.get_world_size():
        raise TpCompileError(
            f"the mesh names rank {int(mesh.mesh.max())}, the world has {dist.get_world_size()} processes",
            todo="start more processes, or make a smaller mesh",
        )
    if mesh.get_coordinate() is None:
        raise TpCompileError(
            f"rank {dist.get_rank()} is no part of the mesh",
            where=f"ranks {mesh.mesh.flatten().tolist()}",
            todo="call this on the ranks of the mesh only",
        )
    return mesh.size() if axis is None else mesh.size(names.index(axis))


def local_device(device_type: str) -> torch.device:
    """This rank's device of a type."""
    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, torch.accelerator.current_device_index())

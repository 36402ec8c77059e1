"""The mesh over all processes, which are connected first if torchrun started them."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tpcompile.errors import TpCompileError


def default_mesh() -> DeviceMesh:
    """One axis over all processes, of accelerators where there are any, else of CPUs.

    Without a process group one is made, as torchrun's environment says.

    Raises:
        TpCompileError: there is no process group and no torchrun.
    """
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

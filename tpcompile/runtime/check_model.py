"""Checks of a model that is to be sharded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import FakeTensor
from tpcompile.weights.replaced import refuse_replaced

from .watched_module import WatchedModule


def check_model(model: nn.Module) -> None:
    """Refuses modules that are not a model, or not one any more.

    Raises:
        TpCompileError: it is sharded already, wrapped, scripted, or has no forward.
    """
    from tpcompile.ir.dynamo_internals import OptimizedModule

    where = type(model).__name__
    sharded = next((name for name, part in model.named_modules() if isinstance(part, WatchedModule)), None)
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, OptimizedModule, torch.jit.ScriptModule)
    if sharded is not None:
        raise TpCompileError(
            "this model is parallelised already", where=sharded or where, todo="use a fresh model, as a whole"
        )
    if isinstance(model, wrappers):
        raise TpCompileError(
            f"a {where} wraps, or has compiled, a model",
            where="model",
            todo="parallelize the model itself first",
        )
    if type(model).forward is nn.Module.forward and "forward" not in vars(model):
        raise TpCompileError(
            f"a {where} has no forward", where="model", todo="give a model that can be called"
        )
    refuse_replaced(
        model.parameters(),
        "this weight is shared with a model that is sharded already",
        "parallelize the module that holds all that share the weight",
    )
    if any(isinstance(p, DTensor) for p in model.parameters()):
        raise TpCompileError(
            "the model's parameters are DTensors",
            where=where,
            todo="parallelize first, then apply FSDP or the like",
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if _is_special(tensor):
            raise TpCompileError(
                f"{name} is a {type(tensor).__name__}, a tensor with operations of its own",
                where=name,
                todo="parallelize the model before it is quantised or wrapped, with plain tensors; or use "
                "a quantisation whose tensors can be taken apart (__tensor_flatten__), as torchao's",
            )
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        raise TpCompileError(
            "a lazy layer does not know its shape yet", where=where, todo="call the model once before"
        )


def _is_special(tensor: Tensor) -> bool:
    """Whether a tensor's class says what operations on it do: it is not what it looks like."""
    kinds: list[Any] = [type(tensor), Tensor, nn.Parameter]
    functions = [getattr(kind.__torch_function__, "__func__", kind.__torch_function__) for kind in kinds]
    plain = kinds[0].__torch_dispatch__ is Tensor.__torch_dispatch__ and functions[0] in functions[1:]
    return not plain and not isinstance(tensor, FakeTensor) and not nn.parameter.is_lazy(tensor)


def check_device(model: nn.Module, mesh: DeviceMesh) -> None:
    """Refuses weights that the program, made for the mesh's device, could not use.

    Raises:
        TpCompileError: with the first such weight.
    """
    for name, param in model.named_parameters():
        if param.device.type not in (mesh.device_type, "meta"):
            raise TpCompileError(
                f"the mesh is for {mesh.device_type}, the model is on {param.device}",
                where=name,
                todo=f"move the model to {mesh.device_type} (or to meta, for a model without weights) first, "
                "or make a mesh for the model's device",
            )


def device_of(model: Any) -> str | None:
    """The type of device that a model is on; None for one without values, or what is not a model."""
    params = model.parameters() if isinstance(model, nn.Module) else ()
    return next((p.device.type for p in params if p.device.type != "meta"), None)

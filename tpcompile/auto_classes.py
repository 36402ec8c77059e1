"""transformers' ``AutoModel...`` classes under their own names: ``from_pretrained`` gives a sharded model.

from tpcompile import AutoModelForCausalLM                      # instead of transformers

model = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.bfloat16, tp_plan="auto")
"""

from __future__ import annotations

import os
from os import PathLike
from typing import Any, ClassVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .errors import TpCompileError
from .from_pretrained import from_pretrained

_PREFIX = "AutoModel"


class ShardingAutoModel:
    """What ``tpcompile.AutoModel...`` derive from; they cannot be instantiated."""

    model_class: ClassVar[Any]

    def __init__(self) -> None:
        raise TpCompileError(f"{type(self).__name__} has no instances", todo="call its from_pretrained")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PathLike[str],
        *,
        tp_plan: Any = "auto",
        tp_size: int | None = None,
        device_mesh: DeviceMesh | None = None,
        **others: Any,
    ) -> Any:
        """``tpcompile.from_pretrained``, called as transformers' own is.

        Args:
            name_or_path: see there.
            tp_plan: the plan: see ``parallelize``; ``"auto"``: the compiler plans.
            tp_size: the number of processes; it is only checked.
            device_mesh: the mesh, by default all processes.
            others: see there.

        Returns:
            The sharded model; its ``_tp_plan`` is the dict of rules that was given, if one was.

        Raises:
            TpCompileError: see there; or ``tp_size`` is not the number of processes.
        """
        if tp_size is not None:
            _check_size(tp_size, device_mesh)
        model = from_pretrained(
            name_or_path, device_mesh, plan=tp_plan, model_class=cls.model_class, **others
        )
        if isinstance(tp_plan, dict):
            model._tp_plan = dict(tp_plan)
        return model


def auto_class(name: str) -> type[ShardingAutoModel]:
    """The counterpart of a class of transformers.

    Raises:
        AttributeError: transformers has no such class.
    """
    import transformers  # takes seconds

    if not name.startswith(_PREFIX) or not hasattr(transformers, name):
        raise AttributeError(f"module 'tpcompile' has no attribute {name!r}")
    return type(name, (ShardingAutoModel,), {"model_class": getattr(transformers, name)})


def _check_size(tp_size: int, mesh: DeviceMesh | None) -> None:
    if mesh is not None:
        ranks = mesh.size()
    else:
        ranks = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if tp_size != ranks:
        raise TpCompileError(
            f"tp_size is {tp_size}, the model would be divided over {ranks} ranks",
            todo="start that many processes, or give device_mesh",
        )

"""transformers' ``AutoModel...`` classes under their own names: ``from_pretrained`` gives a sharded model.

from tpcompile import AutoModelForCausalLM                      # instead of transformers

model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, tp_plan="auto")
"""

from __future__ import annotations

import os
from os import PathLike
from typing import Any, ClassVar

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .errors import TpCompileError
from .from_pretrained import from_pretrained
from .ir.check import checked
from .ranks.mesh import check_mesh
from .runtime.read_request import PlanLike

_PREFIX = "AutoModel"


class ShardingAutoModel:
    """What ``tpcompile.AutoModel...`` derive from; they cannot be instantiated."""

    model_class: ClassVar[Any]

    def __init__(self) -> None:
        raise TpCompileError(
            f"{type(self).__name__} has no instances",
            where="tpcompile.AutoModel...",
            todo="call its from_pretrained",
        )

    @classmethod
    @checked
    def from_pretrained(
        cls,
        name_or_path: str | PathLike[str],
        mesh: DeviceMesh | None = None,
        *,
        plan: PlanLike | None = None,
        tp_plan: PlanLike | None = None,
        tp_size: int | None = None,
        device_mesh: DeviceMesh | None = None,
        **others: Any,
    ) -> Any:
        """``tpcompile.from_pretrained``, called as it is or as transformers' own is.

        Args:
            name_or_path: see there.
            mesh: the mesh, by default all processes.
            plan: see ``parallelize``; by default the compiler plans.
            tp_plan: transformers' name for ``plan``.
            tp_size: the number of processes; it is only checked.
            device_mesh: transformers' name for ``mesh``.
            others: see there.

        Returns:
            The sharded model; its ``_tp_plan`` is the dict of rules that was given, if one was.

        Raises:
            TpCompileError: see there; or ``tp_size`` is not the number of processes.
        """
        where = f"{cls.__name__}.from_pretrained"
        for name, theirs, one, other in (
            ("plan", "tp_plan", plan, tp_plan),
            ("mesh", "device_mesh", mesh, device_mesh),
        ):
            if one is not None and other is not None:
                raise TpCompileError(
                    f"{name} and {theirs} are one argument", where=where, todo="give one of them"
                )
        if "model_class" in others:
            raise TpCompileError("the class is the model's class", where=where, todo="leave model_class out")
        plan = next((one for one in (plan, tp_plan) if one is not None), "auto")
        mesh = mesh if mesh is not None else device_mesh
        if tp_size is not None:
            _check_size(tp_size, mesh, others.get("axis"))
        model = from_pretrained(name_or_path, mesh, plan=plan, model_class=cls.model_class, **others)
        if isinstance(plan, dict):
            model._tp_plan = dict(plan)
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


def _check_size(tp_size: int, mesh: DeviceMesh | None, axis: Any) -> None:
    if mesh is not None:
        ranks = check_mesh(mesh, axis)
    else:
        ranks = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    if tp_size != ranks:
        raise TpCompileError(
            f"tp_size is {tp_size}, the model would be divided over {ranks} ranks",
            where="tp_size",
            todo="start that many processes, or give mesh",
        )

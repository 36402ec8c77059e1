"""What a sharded model shows of itself on a rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import tpcompile
from tests.helpers.toys import Mlp


def shown() -> tuple[str | None, str, str, str]:
    """In a notebook before anything is planned; as text; in a notebook, as a model and as a program."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = tpcompile.parallelize(nn.Sequential(Mlp(20, 33), Mlp(20, 33)).eval(), mesh)
    before = model._repr_html_()
    model(torch.zeros(2, 5, 20))
    return before, repr(model), model._repr_html_() or "", model.programs[0]._repr_html_()

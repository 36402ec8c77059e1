"""A rank of a mesh axis without process groups: for what does not communicate."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ranks.mesh_axis import MeshAxis
from tpcompile.strategies.custom.custom_modules import CustomModules
from tpcompile.weights.sharded_weights import ShardedWeights


def weights_of(layout: WeightLayout, rank: int) -> ShardedWeights:
    """What one rank knows of where weights are."""
    ranks = layout.ranks
    mesh = DeviceMesh("cpu", torch.arange(ranks), mesh_dim_names=("tp",), _init_backend=False, _rank=rank)
    axis = MeshAxis("cpu", (tuple(range(ranks)),), rank, 0, "", False, mesh)
    return ShardedWeights(layout, axis, CustomModules())

"""What is needed to gather, load and save the weights of a sharded model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import nn

from tpcompile.ir.layout.weight_layout import WeightLayout, whole_layout
from tpcompile.ir.module_tensors import whole_tensors
from tpcompile.ranks.mesh_axis import MeshAxis
from tpcompile.strategies.custom.custom_modules import CustomModules

from .tensor_layout import TensorLayout


@dataclass(frozen=True)
class ShardedWeights:
    """Where the weights of a model are, for one rank.

    Attributes:
        layout: of all weights.
        axis: the mesh axis.
        custom: the modules of custom strategies.
    """

    layout: WeightLayout
    axis: MeshAxis
    custom: CustomModules = field(default_factory=CustomModules)

    @classmethod
    def undecided(cls, model: nn.Module, axis: MeshAxis) -> ShardedWeights:
        """All weights whole, until a program decides."""
        ranks = len(axis.rows[0])
        params = {name: whole_layout(name, t, 1) for name, t in whole_tensors(model).items()}
        return cls(WeightLayout((ranks,), params), axis)

    @property
    def rank(self) -> int:
        """This rank's place on the axis."""
        return self.axis.rank

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks of the axis."""
        return self.axis.group

    def of(self, name: str) -> TensorLayout:
        """The layout of one tensor."""
        return TensorLayout(self.layout.params[name], self.layout.axis_sizes, self.axis, self.custom)

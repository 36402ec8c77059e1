"""Process groups of a mesh axis that is split into sub-axes."""

from __future__ import annotations

import itertools
import math

import torch
import torch.distributed as dist
from torch import Tensor

from tpcompile.ir.markers import Axes

from .mesh_axis import MeshAxis
from .own_groups import limit_of, make_group


class AxisGroups:
    """One process group for each subset of a mesh axis' sub-axes.

    An axis of 4 ranks with sizes (2, 2), major first, has the sub-axes 0 and 1: rank 3 is (1, 1).
    The group of the subset (0,) at rank 3 holds the ranks that differ from it in sub-axis 0 only, 1 and 3.
    The subset of all sub-axes is the mesh axis' own group. Groups are made in the constructor, in one
    order: every rank of the axis must construct it, with equal arguments.

    Args:
        axis: the axis of a mesh.
        axis_sizes: sizes of the sub-axes, major first; their product is the size of the axis.

    Attributes:
        names: the names of this rank's groups, by their axes, ascending.
    """

    def __init__(self, axis: MeshAxis, axis_sizes: Axes) -> None:
        rows = torch.tensor(axis.rows)
        assert math.prod(axis_sizes) == rows.shape[1], "sub-axes make up the axis"
        self.axis_sizes = axis_sizes
        self._axis = axis
        self.names: dict[Axes, str] = {}
        every = range(len(axis_sizes))
        for axes in (
            c for size in range(1, len(axis_sizes) + 1) for c in itertools.combinations(every, size)
        ):
            whole = self.size(axes) == rows.shape[1]
            self.names[axes] = axis.group_name if whole else self._create(rows, axes)

    def name(self, axes: Axes) -> str:
        """Name of this rank's group over ascending axes, as `_c10d_functional` takes it."""
        return self.names[axes]

    def size(self, axes: Axes) -> int:
        """Number of ranks in the group over `axes`."""
        return math.prod(self.axis_sizes[a] for a in axes)

    def index(self, axes: Axes) -> int:
        """This rank's position in the group over `axes`."""
        index = 0
        for a in axes:
            index = index * self.axis_sizes[a] + self._coordinate(a)
        return index

    def _coordinate(self, a: int) -> int:
        return self._axis.rank // math.prod(self.axis_sizes[a + 1 :]) % self.axis_sizes[a]

    def _create(self, rows: Tensor, axes: Axes) -> str:
        """Makes this rank's group over `axes`."""
        rest = [a for a in range(len(self.axis_sizes)) if a not in axes]
        grid = rows.reshape(-1, *self.axis_sizes).permute(0, *[a + 1 for a in rest], *[a + 1 for a in axes])
        whole, topic = self._axis.group, f"{axes} of {self.axis_sizes}"
        ranks = next(row for row in grid.reshape(-1, self.size(axes)).tolist() if dist.get_rank() in row)
        meet = f"{whole.group_name}/{topic}/{ranks[0]}"
        limit, backend = limit_of(whole), dist.get_backend(whole)
        return make_group(ranks, meet, limit, backend, f"tpcompile {topic}").group_name

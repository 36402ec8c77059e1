"""Process groups of a mesh axis that is split into sub-axes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from tpcompile.errors import TpCompileError

from .mesh_axis import MeshAxis
from .own_groups import limit_of, make_group

Axes = tuple[int, ...]


class AxisGroups:
    """One process group for each wanted subset of a mesh axis' sub-axes.

    An axis of 4 ranks with factors (2, 2), major first, has the sub-axes 0 and 1: rank 3 is (1, 1).
    The group of the subset (0,) at rank 3 holds the ranks that differ from it in sub-axis 0 only, 1 and 3.
    The subset of all sub-axes is the mesh axis' own group. Groups are made in the constructor, in one
    order: every rank of the axis must construct it, with equal arguments.

    Args:
        axis: the axis of a mesh.
        factors: sizes of the sub-axes, major first; their product is the size of the axis.
        subsets: the subsets that `name` will be asked for; sub-axes in ascending order.
    """

    def __init__(self, axis: MeshAxis, factors: Axes, subsets: Iterable[Axes] = ()) -> None:
        rows = torch.tensor(axis.rows)
        if math.prod(factors) != rows.shape[1] or min(factors, default=1) < 1:
            raise TpCompileError(
                f"Factors {factors} do not make up a mesh axis of {rows.shape[1]} ranks.",
                todo="Give factors whose product is the size of the axis.",
            )
        self.factors = factors
        self._axis = axis
        self._names: dict[Axes, str] = {}
        wanted = sorted({self._checked(axes) for axes in subsets} | {tuple(range(len(factors)))})
        for axes in wanted:
            whole = self.size(axes) == rows.shape[1]
            self._names[axes] = axis.group_name if whole else self._create(rows, axes)

    def name(self, axes: Axes) -> str:
        """Name of this rank's group over `axes`, as `_c10d_functional` and our collectives take it."""
        if axes not in self._names:
            raise TpCompileError(
                f"No process group was made for the sub-axes {axes}.",
                where=f"axis with factors {self.factors}, groups for {sorted(self._names)}",
                todo="List it in `subsets`: groups can't be made later, when ranks may be apart.",
            )
        return self._names[axes]

    def size(self, axes: Axes) -> int:
        """Number of ranks in the group over `axes`."""
        return math.prod(self.factors[a] for a in self._checked(axes))

    def index(self, axes: Axes) -> int:
        """This rank's position in the group over `axes`."""
        index = 0
        for a in self._checked(axes):
            index = index * self.factors[a] + self._coordinate(a)
        return index

    def _coordinate(self, a: int) -> int:
        return self._axis.rank // math.prod(self.factors[a + 1 :]) % self.factors[a]

    def _checked(self, axes: Axes) -> Axes:
        if list(axes) != sorted(set(axes)) or any(not 0 <= a < len(self.factors) for a in axes):
            raise TpCompileError(
                f"{axes} is not a subset of the sub-axes 0 to {len(self.factors) - 1} in ascending order."
            )
        return axes

    def _create(self, rows: Tensor, axes: Axes) -> str:
        """Makes this rank's group over `axes`."""
        rest = [a for a in range(len(self.factors)) if a not in axes]
        grid = rows.reshape(-1, *self.factors).permute(0, *[a + 1 for a in rest], *[a + 1 for a in axes])
        whole, topic = self._axis.group, f"{axes} of {self.factors}"
        ranks = next(row for row in grid.reshape(-1, self.size(axes)).tolist() if dist.get_rank() in row)
        meet = f"{whole.group_name}/{topic}/{ranks[0]}"
        limit, backend = limit_of(whole), dist.get_backend(whole)
        return make_group(ranks, meet, limit, backend, f"tpcompile {topic}").group_name

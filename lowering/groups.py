"""Process groups of a mesh axis that is split into sub-axes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tpcompile.errors import TpCompileError

Axes = tuple[int, ...]


class AxisGroups:
    """One process group for each wanted subset of a mesh axis' sub-axes.

    An axis of 4 ranks with factors (2, 2), major first, has the sub-axes 0 and 1: rank 3 is (1, 1).
    The group of the subset (0,) at rank 3 holds the ranks that differ from it in sub-axis 0 only, 1 and 3.
    The subset of all sub-axes is the mesh axis' own group. Groups are made in the constructor, in one
    order: every rank of the mesh must construct it, with equal arguments.

    Args:
        mesh: a 1-D mesh, or an n-D one of which `axis` is used; a slice of a larger mesh will do.
        factors: sizes of the sub-axes, major first; their product is the size of the axis.
        subsets: the subsets that `name` will be asked for; sub-axes in ascending order.
        axis: name of the mesh axis; needed if the mesh has several.
    """

    def __init__(
        self, mesh: DeviceMesh, factors: Axes, subsets: Iterable[Axes] = (), axis: str | None = None
    ) -> None:
        own, rows = _own_group(mesh, axis), _rows(mesh, axis)
        if math.prod(factors) != rows.shape[1] or min(factors, default=1) < 1:
            raise TpCompileError(
                f"Factors {factors} do not make up a mesh axis of {rows.shape[1]} ranks.",
                todo="Give factors whose product is the size of the axis.",
            )
        self.factors = factors
        row: list[int] = next(row for row in rows.tolist() if dist.get_rank() in row)
        self._position = row.index(dist.get_rank())
        self._names: dict[Axes, str] = {}
        wanted = sorted({self._checked(axes) for axes in subsets} | {tuple(range(len(factors)))})
        # torch makes a mesh's own groups in ascending order of ranks; a permuted mesh needs new ones.
        ascending = bool((rows.sort(dim=1).values == rows).all())
        for axes in wanted:
            whole = self.size(axes) == rows.shape[1]
            self._names[axes] = own.group_name if whole and ascending else self._create(rows, axes)

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
        return self._position // math.prod(self.factors[a + 1 :]) % self.factors[a]

    def _checked(self, axes: Axes) -> Axes:
        if list(axes) != sorted(set(axes)) or any(not 0 <= a < len(self.factors) for a in axes):
            raise TpCompileError(
                f"{axes} is not a subset of the sub-axes 0 to {len(self.factors) - 1} in ascending order."
            )
        return axes

    def _create(self, rows: Tensor, axes: Axes) -> str:
        """Makes the groups over `axes` of all rows, on all ranks alike, and returns this rank's."""
        rest = [a for a in range(len(self.factors)) if a not in axes]
        grid = rows.reshape(-1, *self.factors).permute(0, *[a + 1 for a in rest], *[a + 1 for a in axes])
        # new_group wants every rank of the world, which a mesh over a part of the world can't call on.
        partial_world = rows.numel() != dist.get_world_size()
        name = ""
        for ranks in grid.reshape(-1, self.size(axes)).tolist():
            group = _new_group(
                ranks,
                use_local_synchronization=partial_world,
                group_desc=f"tpcompile {axes} of {self.factors}",
            )
            if dist.get_rank() in ranks:
                name = group.group_name
        return name


def _new_group(ranks: list[int], **options: Any) -> dist.ProcessGroup:
    """A group of ranks in their order, which torch 2.11 would sort."""
    if ranks != sorted(ranks):
        if "sort_ranks" not in inspect.signature(dist.new_group).parameters:
            raise TpCompileError(
                f"torch {torch.__version__} makes no group whose ranks do not ascend",
                where=f"ranks {ranks}",
                todo="use a mesh whose ranks ascend, or a newer torch",
            )
        options["sort_ranks"] = False
    group: dist.ProcessGroup = dist.new_group(ranks, **options)
    return group


def _own_group(mesh: DeviceMesh, axis: str | None) -> dist.ProcessGroup:
    if mesh.ndim > 1 and axis is None:
        raise TpCompileError(
            f"A mesh of {mesh.ndim} dimensions needs the name of one.",
            where=f"mesh dimensions {mesh.mesh_dim_names}",
            todo="Pass axis=..., or slice the mesh, as in mesh['tp'].",
        )
    return mesh.get_group(axis)


def _rows(mesh: DeviceMesh, axis: str | None) -> Tensor:
    """Global ranks, one row for each instance of the axis in the whole mesh, this rank's among them."""
    root = mesh._get_root_mesh()  # a slice knows its own row only, and new_group needs all of them
    names = root.mesh_dim_names or ()
    wanted = axis or (mesh.mesh_dim_names or ("",))[0]
    if wanted in names:
        grid = root.mesh.movedim(names.index(wanted), -1)
        return grid.reshape(-1, grid.shape[-1])
    if mesh.ndim > 1:
        raise TpCompileError(f"The mesh has no dimension {axis!r}.", where=f"mesh dimensions {names}")
    return mesh.mesh.reshape(1, -1)  # no names, or a flattened axis

"""What a sharded model remembers of the mesh that it was divided over."""

from __future__ import annotations

import atexit
import copy
import functools
import math
import time
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.torch_internals import resolve_process_group

from .exchange import exchange
from .mesh import Axis
from .own_groups import TIMEOUT, backend_of, own_group

_FAREWELL = 0.05
"""Seconds."""


@dataclass(frozen=True)
class MeshAxis:
    """The axis of a mesh that a model is divided over.

    Its mesh holds no process groups, as the user's does. A model lives until its reference cycles are found,
    and a group that outlives ``destroy_process_group`` still has threads when the interpreter ends: gloo's
    abort the process if they then want to let go of a tensor (pytorch issue 190489).

    Attributes:
        device_type: the mesh's.
        rows: global ranks, a row for each instance of the axis in the whole mesh, this rank's among them;
            ascending, whatever the mesh's order, as in the process group that torch makes for a row.
        rank: this rank's place on the axis.
        replica: this rank's place on all other axes together; 0 comes first.
        group_name: what torch knows the axis' process group by; over gloo it is a group of ours.
        shared: whether the mesh has other axes, and all processes: then they make their calls together.
        mesh: the axis as a mesh of its own, for ``DTensor``.
    """

    device_type: str
    rows: tuple[tuple[int, ...], ...]
    rank: int
    replica: int
    group_name: str
    shared: bool
    mesh: DeviceMesh = field(compare=False)

    @classmethod
    def of(cls, mesh: DeviceMesh, axis: Axis | None = None, timeout: float = TIMEOUT) -> MeshAxis:
        """The axis of a mesh; all of its ranks call this.

        Args:
            mesh: a 1-D mesh, or an n-D one of which `axis` is used; a slice of a larger mesh will do.
            axis: name of the mesh axis, or names of several; needed if the mesh has several (``check_mesh``).
            timeout: seconds that ranks wait for each other (see ``own_group``).

        Raises:
            TpCompileError: see ``line_of``; or a rank did not come.
        """
        _say_farewell()
        line = line_of(mesh, axis, timeout)
        rows = _rows(line).sort(dim=1).values
        replica, rank = (rows == dist.get_rank()).nonzero()[0].tolist()
        shared = mesh.ndim > 1 and mesh.size() == dist.get_world_size()
        group = line.get_group()
        own = own_group(group, timeout)  # in any case: messages travel in it
        name = (own if backend_of(group, mesh.device_type) == "gloo" else group).group_name
        rows_ = tuple(map(tuple, rows.tolist()))
        return cls(mesh.device_type, rows_, rank, replica, name, shared, _without_groups(line))

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks of the axis; asked for each time, for the reason above."""
        return resolve_process_group(self.group_name)  # type: ignore[arg-type]

    @property
    def everyone(self) -> dist.ProcessGroup:
        """The ranks that make their calls together: those of the mesh's other axes too, if it has any.

        Of several replicas the first one writes files, and all of them must know that these are there.
        """
        return cast(dist.ProcessGroup, dist.group.WORLD) if self.shared else self.group


def _without_groups(mesh: DeviceMesh) -> DeviceMesh:
    """An equal mesh that asks torch for its process groups, each time, by their names."""
    bare = copy.copy(mesh)
    bare._pg_registry, bare._flatten_mapping = {}, {}
    if mesh._root_mesh is not None:
        bare._root_mesh = _without_groups(mesh._root_mesh)
    return bare


def line_of(mesh: DeviceMesh, axis: Axis | None, timeout: float = TIMEOUT) -> DeviceMesh:
    """An axis of a mesh, or several as one, as a mesh of its own; all of the mesh's ranks call this.

    Args:
        mesh: the user's.
        axis: as ``check_mesh`` accepts it.
        timeout: seconds that ranks wait for each other.

    Raises:
        TpCompileError: torch cannot make one axis of several; or a rank did not come.
    """
    names = (axis,) if isinstance(axis, str) else axis
    if names is None or len(names) == 1:
        return mesh if names is None else mesh[names]
    root, where = mesh._get_root_mesh(), f"axes {names}"
    if "_".join(names) not in root._flatten_mapping:  # torch has all processes make its groups, at once
        if root.size() != dist.get_world_size():
            some = f"{root.size()} of {dist.get_world_size()} processes"
            what = f"axes of a mesh of {some} cannot be used as one"
            raise TpCompileError(what, where=where, todo="make the mesh of all processes, or with one axis")
        everyone = own_group(cast(dist.ProcessGroup, dist.group.WORLD), timeout)
        exchange(everyone, f"use the axes {names} as one", None)
    with refusing("the axes cannot be used as one", where=where, todo="give the mesh's axes other names"):
        return mesh[names]._flatten()


def _rows(line: DeviceMesh) -> Tensor:
    """Global ranks, one row for each instance of a 1-D mesh in the whole mesh that it is a part of.

    The mesh's axes that it is made of are those along which its ranks lie apart.
    """
    grid = line._get_root_mesh().mesh  # a slice knows its own row only, and new_group needs all of them
    places = torch.stack([(grid == rank).nonzero()[0] for rank in line.mesh])
    along = [axis for axis in range(grid.ndim) if places[:, axis].unique().numel() > 1]
    size = math.prod(grid.shape[axis] for axis in along)
    if size != line.size():
        raise TpCompileError(
            f"the axis holds {line.size()} of the {size} ranks along axes of the mesh that it is a part of",
            where=f"axes {line.mesh_dim_names}",
            todo="make the mesh with init_device_mesh, with an axis for each use",
        )
    return grid.movedim(along, list(range(-len(along), 0))).reshape(-1, size)


@functools.cache
def _say_farewell() -> None:
    """At exit, lets other threads run for a moment: a mesh of the user's may still hold a gloo group.

    Its thread frees the last collective's tensors after that has ended, and has to take the interpreter's
    lock for that, which aborts the process once the interpreter has begun to end.
    """
    atexit.register(time.sleep, _FAREWELL)

"""What a sharded model remembers of the mesh that it was divided over."""

from __future__ import annotations

import atexit
import copy
import functools
import time
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import resolve_process_group

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
    def of(cls, mesh: DeviceMesh, axis: str | None = None, timeout: float = TIMEOUT) -> MeshAxis:
        """The axis of a mesh; all of its ranks call this.

        Args:
            mesh: a 1-D mesh, or an n-D one of which `axis` is used; a slice of a larger mesh will do.
            axis: name of the mesh axis; needed if the mesh has several (see ``check_mesh``).
            timeout: seconds that ranks wait for each other (see ``own_group``).

        Raises:
            TpCompileError: the axis is made of several; or a rank did not come.
        """
        _say_farewell()
        rows = _rows(mesh, axis).sort(dim=1).values
        replica, rank = (rows == dist.get_rank()).nonzero()[0].tolist()
        shared = mesh.ndim > 1 and mesh.size() == dist.get_world_size()
        group = mesh.get_group(axis)
        own = own_group(group, timeout)  # in any case: messages travel in it
        name = (own if backend_of(group, mesh.device_type) == "gloo" else group).group_name
        line = mesh if axis is None or mesh.ndim == 1 else mesh[axis]
        rows_ = tuple(map(tuple, rows.tolist()))
        return cls(mesh.device_type, rows_, rank, replica, name, shared, _without_groups(line))

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks of the axis; asked for each time, for the reason above."""
        return resolve_process_group(self.group_name)  # type: ignore[arg-type]


def _without_groups(mesh: DeviceMesh) -> DeviceMesh:
    """An equal mesh that asks torch for its process groups, each time, by their names."""
    bare = copy.copy(mesh)
    bare._pg_registry, bare._flatten_mapping = {}, {}
    if mesh._root_mesh is not None:
        bare._root_mesh = _without_groups(mesh._root_mesh)
    return bare


def _rows(mesh: DeviceMesh, axis: str | None) -> Tensor:
    """Global ranks, one row for each instance of the axis in the whole mesh."""
    root = mesh._get_root_mesh()  # a slice knows its own row only, and new_group needs all of them
    names = root.mesh_dim_names or ()
    wanted = axis or (mesh.mesh_dim_names or ("",))[0]
    if wanted in names:
        grid = root.mesh.movedim(names.index(wanted), -1)
        return grid.reshape(-1, grid.shape[-1])
    if mesh.ndim > 1:
        raise TpCompileError(
            f"the axis {axis!r} is made of several", where=f"axes {names}", todo="slice the mesh: mesh['tp']"
        )
    return mesh.mesh.reshape(1, -1)  # no names, or a flattened axis


@functools.cache
def _say_farewell() -> None:
    """At exit, lets other threads run for a moment: a mesh of the user's may still hold a gloo group.

    Its thread frees the last collective's tensors after that has ended, and has to take the interpreter's
    lock for that, which aborts the process once the interpreter has begun to end.
    """
    atexit.register(time.sleep, _FAREWELL)

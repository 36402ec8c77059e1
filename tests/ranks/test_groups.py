"""Process groups of sub-axes, on meshes of several kinds."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import tpcompile
from tests.helpers.run_ranks import run_spmd
from tests.helpers.spmd_judge import fake_mesh
from tests.helpers.toys import Mlp
from tpcompile.ranks.groups import AxisGroups
from tpcompile.ranks.mesh_axis import MeshAxis


def _members(name: str, index: int, size: int) -> list[int]:
    """Ranks of the group in its order, checked against index and size by a real collective."""
    mine = torch.tensor([dist.get_rank()])
    out = torch.ops._c10d_functional.all_gather_into_tensor(mine, size, name)
    out = torch.ops._c10d_functional.wait_tensor(out)
    assert out[index] == dist.get_rank()
    return out.tolist()


def check_groups(kind: str) -> dict[tuple[int, ...], list[int]]:
    if kind == "rows":
        mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("dp", "tp"))["tp"]
    elif kind == "columns":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp"))
    elif kind == "permuted":
        mesh = DeviceMesh("cpu", [3, 1, 0, 2])
    else:
        mesh = init_device_mesh("cpu", (4,))
    factors = (2,) if kind == "columns" else (2, 2)
    subsets = [(0,)] if kind == "columns" else [(1,), (0,), (0, 1)]
    axis = MeshAxis.of(mesh, "tp" if kind == "columns" else None)
    groups = AxisGroups(axis, factors)
    assert groups.name(tuple(range(len(factors)))) == axis.group_name
    return {axes: _members(groups.name(axes), groups.index(axes), groups.size(axes)) for axes in subsets}


def test_groups_of_sub_axes() -> None:
    for kind in ("plain", "rows", "permuted"):
        assert run_spmd(check_groups, 4, kind) == [
            {(0,): [rank % 2, rank % 2 + 2], (1,): [rank // 2 * 2, rank // 2 * 2 + 1], (0, 1): [0, 1, 2, 3]}
            for rank in range(4)
        ]
    assert run_spmd(check_groups, 4, "columns") == [{(0,): [rank % 2, rank % 2 + 2]} for rank in range(4)]


def test_torchs_fake_group() -> None:
    """Nothing is sent over it, and it has no time limit: ``benchmarks/wire.py`` counts with it."""
    x = torch.ones(3, 5, 12)
    with fake_mesh((2,)) as mesh:
        assert tpcompile.parallelize(Mlp(), mesh, (x,))(x).shape == x.shape

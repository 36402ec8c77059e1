"""A tensor axis beside a data axis, in torch's ways, or beside a pipeline's: training goes as unsharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

import tpcompile
from tests.helpers.run_ranks import run_spmd
from tests.helpers.spmd_judge import fake_mesh
from tests.helpers.toys import Mlp
from tests.on_ranks import axes, joined_axes
from tpcompile import TpCompileError
from tpcompile.ranks.mesh import check_mesh
from tpcompile.ranks.mesh_axis import MeshAxis, line_of

CLOSE = 1e-12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


def test_data_parallelism_and_checkpoints_of_it(folder: str) -> None:
    """Accumulated gradients, clipped; saved while training goes on; resumed in other ways."""
    for found in run_spmd(axes.data_parallel, 4, folder):
        assert found.keys() == {"ddp", "layers", "hsdp"}
        assert max(error for errors in found.values() for error in errors.values()) <= CLOSE, found
    assert sorted(p.name for p in Path(folder).iterdir()) == ["ddp", "hsdp", "layers"]
    for found in run_spmd(axes.resume, 4, [("layers", "alone", (1, 4)), ("ddp", "whole", (4, 1))], folder):
        assert max(found) <= CLOSE, found
    for found in run_spmd(axes.resume, 2, [("hsdp", "alone", (1, 2))], folder):
        assert max(found) <= CLOSE, found
    assert max(axes.resume_unsharded(f"{folder}/{kind}") for kind in ("ddp", "layers")) <= CLOSE


def test_several_axes_as_one(tmp_path: Path) -> None:
    """The same model as over one axis of as many ranks, to the last bit; also on disk, and from there."""
    for found in run_spmd(joined_axes.like_one_axis, 4, str(tmp_path)):
        assert found == {"grid": [], "slice": [], "other order": []}


def test_several_axes_beside_a_data_axis() -> None:
    for found in run_spmd(joined_axes.data_parallel, 4):
        assert max(found.values()) <= CLOSE, found


def test_ranks_of_several_axes() -> None:
    """Whatever the mesh's order, ranks that are one apart along the other axes are one row."""
    with fake_mesh((2, 2, 2)) as mesh:
        expected = {
            "0": [[0, 4], [1, 5], [2, 6], [3, 7]],
            ("0", "1"): [[0, 2, 4, 6], [1, 3, 5, 7]],
            ("0", "2"): [[0, 1, 4, 5], [2, 3, 6, 7]],
            ("1", "2"): [[0, 1, 2, 3], [4, 5, 6, 7]],
            ("0", "1", "2"): [[0, 1, 2, 3, 4, 5, 6, 7]],
        }
        for axis, rows in expected.items():
            assert MeshAxis.of(mesh, axis).rows == tuple(map(tuple, rows))
            assert check_mesh(mesh, axis) == len(rows[0])
        part = mesh["0", "2"]
        for own in (MeshAxis.of(part._flatten("own")), MeshAxis.of(part, ("0", "2"))):
            assert own.rows == ((0, 1, 4, 5), (2, 3, 6, 7))
        assert MeshAxis.of(mesh, ("1",)) == MeshAxis.of(mesh, "1")


def test_axes_that_cannot_be_one() -> None:
    with fake_mesh((2, 2, 2)) as mesh:
        for axis, reason in {
            ("2", "0"): "are not the mesh's axes in its order.*give axis=.'0', '2'",
            ("0", "0"): "are not the mesh's axes in its order.*give axis=.'0',",
            ("0", "tp"): "no axis .'0', 'tp'.*several in a tuple",
            (): "no axis ..",
            ("0", 1): "no axis .'0', 1",
            None: "the mesh has 3 axes.*a tuple of several",
        }.items():
            with pytest.raises(TpCompileError, match=f"(?s){reason}"):
                check_mesh(mesh, axis)
        mesh["1", "2"]._flatten("0_1")
        with pytest.raises(TpCompileError, match=r"(?s)used as one.*give the mesh's axes other names"):
            line_of(mesh, ("0", "1"))
        part = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("a", "b"))
        with pytest.raises(TpCompileError, match=r"(?s)4 of 8 processes.*make the mesh of all processes"):
            line_of(part, ("a", "b"))
        whole = DeviceMesh("cpu", list(range(8)), mesh_dim_names=("all",))
        with pytest.raises(TpCompileError, match=r"(?s)2 of the 8 ranks.*init_device_mesh"):
            MeshAxis.of(whole._unflatten(0, (4, 2), ("a", "b"))["b"])


def test_a_plan_for_several_axes() -> None:
    model, x = Mlp(), torch.ones(3, 5, 12)
    with fake_mesh((2, 3, 2)) as mesh:
        planned = tpcompile.plan(model, mesh, (x,), axis=("0", "2"))
    assert str(planned) == str(tpcompile.plan(model, 4, (x,), cost_model="cpu"))


def test_parameters_that_some_steps_do_not_use() -> None:
    assert max(run_spmd(axes.unused_parameters, 4)) <= CLOSE


def test_pipelines() -> None:
    """Also where gradients of weights are computed later than those of inputs."""
    for found in run_spmd(axes.pipelines, 4):
        assert max(found.values()) <= CLOSE, found

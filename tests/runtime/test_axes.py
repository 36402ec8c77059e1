"""A tensor axis beside a data axis, in torch's ways, or beside a pipeline's: training goes as unsharded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import axes

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


def test_parameters_that_some_steps_do_not_use() -> None:
    assert max(run_spmd(axes.unused_parameters, 4)) <= CLOSE


def test_pipelines() -> None:
    """Also where gradients of weights are computed later than those of inputs."""
    for found in run_spmd(axes.pipelines, 4):
        assert max(found.values()) <= CLOSE, found

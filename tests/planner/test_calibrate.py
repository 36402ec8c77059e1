"""Measuring a mesh of two gloo processes, and planning with what was measured."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import tpcompile
from tests.helpers import families
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks.models import CAPTURED, call, mesh
from tpcompile import CostModel, TpCompileError


def measure() -> tuple[CostModel, float]:
    """The cost model, and the seconds that it took."""
    start = time.perf_counter()
    return tpcompile.calibrate(mesh()), time.perf_counter() - start


def placements(cost_model: CostModel | str) -> dict[str, Any]:
    """What a tiny llama's plan says of every parameter, and how many collectives it has."""
    sharded = tpcompile.parallelize(
        families.build("llama"), mesh(), example_kwargs=call("llama", CAPTURED), cost_model=cost_model
    )
    plan = sharded.plan
    segments = {name: [s.shards for s in param.segments] for name, param in plan.layout.params.items()}
    return {"weights": segments, "collectives": plan.collectives, "cost": plan.cost.name}


def plans() -> tuple[dict[str, Any], dict[str, Any]]:
    """With what was measured, and with the preset."""
    return placements(tpcompile.calibrate(mesh())), placements("cpu")


def refusals() -> list[str]:
    """The messages of calls that cannot be met."""
    grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("tp", "pp"))
    calls: list[tuple[Any, Any]] = [(grid, None), (grid, "dp"), ("cpu", None)]
    messages = []
    for where, axis in calls:
        try:
            tpcompile.calibrate(where, axis)
            messages.append("accepted")
        except TpCompileError as refusal:
            messages.append(str(refusal))
    messages += [tpcompile.calibrate(grid, axis).name for axis in ("pp", ("tp", "pp"))]
    return messages


def test_ranks_agree_on_plausible_numbers() -> None:
    (first, seconds), (second, _) = run_spmd(measure, 2)
    assert first == second
    assert first.name == "calibrated cpu x2"
    numbers = [value for value in asdict(first).values() if isinstance(value, float)]
    assert len(numbers) == 5
    assert all(math.isfinite(number) and number > 0 for number in numbers)
    assert 1e8 < first.flops < 1e13
    assert 1e8 < first.memory < 1e12
    assert 1e-6 < first.latency < 0.5
    assert 1e6 < first.bandwidth < 1e12
    assert 1e-8 < first.launch < 0.1
    assert seconds < 30  # a loaded machine; alone it takes one or two


def test_plans_like_the_preset() -> None:
    for measured, preset in run_spmd(plans, 2, timeout=300):
        assert measured.pop("cost") == "calibrated cpu x2"
        assert preset.pop("cost") == "cpu"
        assert measured == preset


def test_bad_requests_are_refused() -> None:
    for two_axes, unknown, no_mesh, single, both in run_spmd(refusals, 2):
        assert "2 axes" in two_axes and "give axis=" in two_axes
        assert "no axis 'dp'" in unknown
        assert "give a DeviceMesh" in no_mesh
        assert (single, both) == ("calibrated cpu x1", "calibrated cpu x2")


def test_no_process_group() -> None:
    assert not dist.is_initialized()
    lone = DeviceMesh("cpu", torch.arange(2), _init_backend=False, _rank=0)
    with pytest.raises(TpCompileError, match="no process group"):
        tpcompile.calibrate(lone)

"""A sharded model as a module among others: changed, copied, loaded, hooked, trained; and misused."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import tpcompile
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import module_life as life
from tpcompile.errors import TpCompileError

F32 = 1e-5
WANTS = torch.ones(4, requires_grad=True)


def _assert_told(function: Callable[[], list[str]], expected: list[str]) -> None:
    """Both ranks get these messages."""
    for messages in run_spmd(function, 2):
        for message, part in zip(messages, expected, strict=True):
            assert part in message


def test_what_is_baked_into_graphs_selects_the_program() -> None:
    for found in run_spmd(life.settings, 2):
        assert found.pop("layout")
        assert found.pop("programs") == 4
        assert max(found.values()) <= F32, found


def test_a_configuration_that_changes() -> None:
    for found in run_spmd(life.configuration, 2, timeout=300):
        assert found == [True, False, True, 2]


def test_what_forward_finds_out_while_it_is_captured() -> None:
    """It is kept, as without us; both kinds of calls read it, and have a program before and after."""
    assert run_spmd(life.found_out_in_forward, 2) == [["single_label_classification", 4]] * 2


def test_gradients_that_are_wanted_later() -> None:
    assert max(run_spmd(life.gradients_are_wanted_later, 2)) <= F32


def test_captured_inside_of_activation_checkpointing() -> None:
    assert max(run_spmd(life.checkpointed, 2)) <= F32


def test_assignments_in_forward() -> None:
    assert max(run_spmd(life.assignments, 2)) <= F32


def test_results_show_what_buffers_were() -> None:
    assert max(run_spmd(life.shown_buffers, 2)) <= F32


def test_batch_norm_between_divided_layers_trains() -> None:
    assert max(run_spmd(life.batch_statistics, 2)) <= F32
    assert max(run_spmd(life.batch_statistics, 3)) <= F32
    assert max(run_spmd(life.batch_statistics, 2, 2)) <= F32


def test_deep_copies() -> None:
    for found in run_spmd(life.copies, 2):
        assert max(found.values()) <= F32, found


def test_state_dicts() -> None:
    for found in run_spmd(life.state_dicts, 2):
        assert max(found.values()) <= F32, found


def test_hooks_on_parts_run() -> None:
    for found in run_spmd(life.hooks, 2):
        assert max(found.values()) <= F32, found


def test_changes_are_refused_before_they_are_made() -> None:
    expected = ["a parametrization", "is replaced by one of", *["replaced, added or removed"] * 2]
    expected += ["accepted", "replaced again"]
    for messages in run_spmd(life.changes, 2):
        for message, part in zip(messages, expected, strict=True):
            assert part in message


def test_plans_and_calls_that_do_not_fit() -> None:
    expected = [
        "the mesh names rank 2, the world has 2 processes",
        "second.up.weight has shape (18, 12), the plan is for (16, 12)",
        "0.up.weight is not in the plan",
        "plan is None",
        "plan is {3: ",
        "x is on meta",
        "no tensors",
        "parallelised already",
        "parallelised already",
    ]
    _assert_told(life.misfits, expected)


def test_calls_that_are_exported_or_transformed() -> None:
    for found, messages in run_spmd(life.transformed, 2):
        assert max(found.values()) <= F32, found
        assert "or traced" in messages.pop(0)
        traced, distributed, nested = messages[4:]
        assert "torch.jit.trace" in traced and "is a DTensor" in distributed and "nested" in nested
        assert all("do not see through" in message for message in messages[:4]), messages


def test_rows_that_do_not_exist_are_not_zeros() -> None:
    for found in run_spmd(life.rows_that_do_not_exist, 3):
        assert found == ["index out of range in self"] * 6


def test_norms_of_whole_gradients() -> None:
    assert max(run_spmd(life.norms, 4)) <= F32


def test_scaled_gradients() -> None:
    assert max(run_spmd(life.scaled, 2)) <= F32


def test_ranks_that_differ_are_told() -> None:
    expected = [
        "different weights",
        "different requests",
        "'compare_calls: False', rank 1 has 'compare_calls: True'",
        "frist.up",
        "different calls",
        "different calls",
        "different calls",
    ]
    _assert_told(life.ranks_differ, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the names of threads in /proc")
def test_a_model_does_not_keep_process_groups() -> None:
    """Their threads end with ``destroy_process_group``, though the model is still there."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = tpcompile.parallelize(nn.Linear(4, 4), init_device_mesh("cpu", (1,)), (torch.ones(1, 4),))
        assert _gloo_threads()
    finally:
        dist.destroy_process_group()
    assert not _gloo_threads()
    assert model.programs


def test_a_constant_that_wants_a_gradient_is_refused_where_gradients_are_recorded() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, x = nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 4)
        model[0].register_forward_hook(lambda part, given, made: made * WANTS)
        sharded = tpcompile.parallelize(model, init_device_mesh("cpu", (1,)), (x,))
        with pytest.raises(TpCompileError, match="wants a gradient"):
            sharded(x)
        with torch.no_grad():
            assert sharded(x).shape == x.shape
    finally:
        dist.destroy_process_group()


def _gloo_threads() -> int:
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("pt_gloo") for name in names)

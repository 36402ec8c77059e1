"""Parameters of a sharded model in everyday use: right for the whole, or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

import tpcompile
from tests.helpers.one_rank import weights_of
from tests.helpers.run_ranks import run_spmd
from tests.helpers.toys import Mlp
from tests.on_ranks import parameters as spmd
from tpcompile.weights.tensor_layout import UnsayableSpec

CLOSE = 1e-10


@pytest.mark.parametrize("reads", [spmd.reads, spmd.reads_of_unasked])
def test_python_reads_whole_weights(reads: Callable[[], dict[str, float]]) -> None:
    for found in run_spmd(reads, 2):
        assert max(found.values()) <= CLOSE, found


def test_optimizers_see_whole_parameters() -> None:
    for found in run_spmd(spmd.optimizers, 2):
        assert max(found.values()) <= CLOSE, found


def test_lists_of_tensors() -> None:
    """A state that is not a part would be written in vain; a step outdates what autograd has saved."""
    for found, fused, stale in run_spmd(spmd.by_hand, 2):
        assert found <= CLOSE
        assert "laid out otherwise" in fused
        assert "modified by an inplace operation" in stale


def test_clipping_is_alike_on_all_ranks() -> None:
    for *messages, gradients in run_spmd(spmd.clipped_differently, 2):
        assert all("different parameters, or clip them differently" in message for message in messages)
        assert gradients == "as they were"


def test_what_cannot_be_right_is_refused() -> None:
    expected = ["which share the model"] * 2 + [
        "flattens",
        "broadcasts",
        "draw numbers",
        "draws numbers for",
        "read as memory",
        *["draw numbers"] * 3,
        "as if it were all of it",
        *["read as memory"] * 2,
        "the memory of another one",
        "used as a tensor",
        *["in other placements"] * 2,
        *["over another mesh, or have other types"] * 2,
        "saved by rank",
        "data parallelism, or a hook, is to see",
        "failed to take the state dict",
        *["the model had before it was sharded"] * 2,
        "accepted",  # what is not sharded is none of our business
    ]
    for messages in run_spmd(spmd.refusals, 2):
        for message, part in zip(messages, expected, strict=True):
            assert part in message


def test_types_that_are_assigned_select_the_program() -> None:
    for found, programs in run_spmd(spmd.retyped, 2):
        assert all(mine == theirs and worst <= 1e-2 for mine, theirs, worst in found), found
        assert programs == 3


@pytest.mark.parametrize("kind", ["fully_shard", "DistributedDataParallel"])
def test_a_call_that_is_refused_divides_nothing(kind: str) -> None:
    for said, whole, worst in run_spmd(spmd.divided_by_another, 2, kind):
        assert f"that {kind} has as it is" in said
        assert whole and worst <= 1e-5


@pytest.mark.parametrize("order, said", [([0, 1], True), ([1, 0], False)])
def test_a_mesh_in_another_order_is_not_divided_further(order: list[int], said: bool) -> None:
    """DTensor's parts go by the mesh, ours by ascending ranks."""
    layout = tpcompile.plan(Mlp(), 2, (torch.ones(2, 3, 12),)).layout
    weights = weights_of(layout, 0)
    mesh = DeviceMesh("cpu", torch.tensor(order), _init_backend=False, _rank=0)
    spec = replace(weights, axis=replace(weights.axis, mesh=mesh)).of("up.weight").spec(torch.float32)
    assert isinstance(spec, UnsayableSpec) is not said

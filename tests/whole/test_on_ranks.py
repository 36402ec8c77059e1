"""Whole models on two, three and four gloo processes against the unsharded model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import families
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import models as spmd_models

TIMEOUT = 420
F32 = 1e-5
ON_TWO = ("phi3", "cohere", "olmo2", "gpt_oss", "falcon_mqa", "gpt2", "bert", "vit", "two_towers")
SEVERAL_KINDS = ("gpt_oss", "two_towers")
"""Whose layers differ; of others one is enough."""
ELSEWHERE = (("two_kv_heads", 4), ("phi3_one_kv_head", 3), ("three_heads", 3), ("falcon_gqa", 4))


def check(name: str, ranks: int, backend: str = "", **fields: int) -> None:
    """A forward, the same at other sizes, and the state dict, on every rank."""
    for found in run_spmd(spmd_models.forward, ranks, name, backend, fields, timeout=TIMEOUT):
        assert found["captured"] <= F32
        assert found["other"] <= F32
        assert found["type"]
        assert found["state"]
        assert found["programs"] == 1


@pytest.mark.parametrize("name", ON_TWO)
def test_two_ranks(name: str) -> None:
    check(name, 2, **({} if name in SEVERAL_KINDS else {"num_hidden_layers": 1}))


@pytest.mark.parametrize(("name", "ranks"), ELSEWHERE)
def test_three_and_four_ranks(name: str, ranks: int) -> None:
    check(name, ranks, num_hidden_layers=1)


def test_a_mesh_in_another_order() -> None:
    assert max(run_spmd(spmd_models.permuted, 4, timeout=TIMEOUT)) <= F32


@pytest.mark.parametrize(("name", "backend"), [("llama", "inductor"), ("mixtral", "aot_eager")])
def test_compiled_without_graph_breaks(name: str, backend: str) -> None:
    check(name, 2, backend, num_hidden_layers=1)


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral", "t5"])
def test_gradients(name: str) -> None:
    assert max(run_spmd(spmd_models.gradients, 2, name, timeout=TIMEOUT)) <= F32


def test_bf16_is_as_close_as_the_whole_model() -> None:
    for mine, theirs in run_spmd(spmd_models.half, 2, "llama", timeout=TIMEOUT):
        assert mine <= 1.5 * theirs


def test_bad_requests_change_nothing() -> None:
    expected = [
        "no axis 'dp'",
        "names no module",
        "which is neither a placement nor a strategy",
        "which this parameter does not have",
        "unknown plan 'best'",
        "allowed",
        "is not a DeviceMesh",
        "no cost model named 'abacus'",
        "context",
        "parallelised already",
    ]
    for messages in run_spmd(spmd_models.refusals, 2, timeout=TIMEOUT):
        assert len(messages) == len(expected)
        for message, part in zip(messages, expected, strict=True):
            assert part in message


def test_ranks_with_different_models_are_told() -> None:
    for message in run_spmd(spmd_models.ranks_differ, 2, timeout=TIMEOUT):
        assert "different captured graphs" in message
        assert "relu" in message and "tanh" in message


def test_a_rank_that_fails_tells_the_others() -> None:
    first, second = run_spmd(spmd_models.one_rank_fails, 2, timeout=TIMEOUT)
    assert "rank 1 failed to capture" in first
    assert "y.sum() > 0" in second


def test_fixed_shapes_refuse_others() -> None:
    for message, programs in run_spmd(spmd_models.fixed_shapes, 2, timeout=TIMEOUT):
        assert "other shapes" in message
        assert programs == 1


def test_programs_over_the_same_weights() -> None:
    for found in run_spmd(spmd_models.programs, 2, timeout=TIMEOUT):
        assert "call model.capture(...)" in found["compile"]
        assert max(found["masked"], found["hidden"], found["compiled"]) <= F32
        assert len(found["programs"]) == 3


def test_plan_from_disk(tmp_path: Path) -> None:
    for found in run_spmd(spmd_models.saved_plan, 2, str(tmp_path / "plan.json"), timeout=TIMEOUT):
        assert found["error"] <= F32
        assert found["same"]
        assert "qkv_proj" in found["text"]


def test_every_name_is_known() -> None:
    assert {*ON_TWO, "llama", "mixtral"} <= families.FAMILIES.keys()
    assert {name for name, _ in ELSEWHERE} <= families.EDGE_CASES.keys()

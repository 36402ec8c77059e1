"""A user's own strategies: the recipe of transformers' document, and what may go wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers import families
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import custom as spmd_custom

F64 = 1e-11
Q_PROJ = {"model.layers.*.self_attn.q_proj": "colwise_custom"}


def check(name: str, ranks: int, plan: dict[str, Any], compiled: bool = False) -> None:
    """Forward, gradients and weights of a model under a plan."""
    for found in run_spmd(spmd_custom.equal, ranks, name, plan, compiled, timeout=300):
        assert found["forward"] <= F64
        assert found["gradients"] <= F64
        assert found["state"] and found["plain"]
        assert found["programs"] == 1


# Of six layers three are captured; with two key heads, four ranks are planned as 2 x 2.
@pytest.mark.parametrize(("name", "ranks"), [("6 layers of llama", 2), ("two_kv_heads", 4)])
def test_the_documents_example(name: str, ranks: int) -> None:
    check(name, ranks, Q_PROJ)


@pytest.mark.parametrize("ranks", [2, 4])
def test_plain_packed_and_gathering(ranks: int) -> None:
    check("packed", ranks, {"inner": "plain_custom", "gate_up": "packed_custom", "odd": "gathering_custom"})


def test_a_module_of_two_names() -> None:
    """By its second one, of which the plan says nothing else."""
    check("shared", 2, {"again": "colwise_custom"})


def test_compiled() -> None:
    check("packed", 2, {"inner": "colwise_custom", "gate_up": "packed_custom"}, compiled=True)


def test_checkpoints_are_read_and_written_by_slices(tmp_path: Path) -> None:
    model = families.build("llama", intermediate_size=70, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "a")
    for wrong, same in run_spmd(spmd_custom.loaded, 4, str(tmp_path / "a"), str(tmp_path / "b"), timeout=300):
        assert wrong <= 1e-5
        assert same


def test_a_partition_that_computes() -> None:
    for wrong, messages in run_spmd(spmd_custom.halved, 2):
        assert wrong <= F64
        assert all("not cut out of the parameter" in message for message in messages)


def test_norms_of_parts_that_were_cut_out() -> None:
    for wrong in run_spmd(spmd_custom.norms, 4):
        assert max(wrong.values()) <= F64, wrong


def test_modules_in_repeated_layers_have_state_of_their_own() -> None:
    for wrong in run_spmd(spmd_custom.own_state, 2):
        assert set(wrong) == {"tensor", "function", "later", "later 4", "later 0"}
        assert max(wrong.values()) <= F64


def test_bad_strategies_change_nothing() -> None:
    expected = [
        "does not implement partition_tensor",
        "returned a NoneType",
        "returned torch.bfloat16",
        "which is neither a placement nor a strategy",
        "names no module",
        "made of several blocks",
        "do not divide evenly by rows",
        "has the local shape",
    ]
    for messages in run_spmd(spmd_custom.refusals, 4):
        assert len(messages) == len(expected)
        for message, part in zip(messages, expected, strict=True):
            assert part in message


def test_the_documents_snippets(tmp_path: Path) -> None:
    """Run as written, but for the import: an automatic plan, a dict, a registered strategy."""
    families.build("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    for found in run_spmd(spmd_custom.document, 2, str(tmp_path), timeout=300):
        whole = found.pop("whole")
        assert max(found.values()) <= 1.5 * whole, found

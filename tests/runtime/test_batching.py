"""Continuous batching over sharded models: the unsharded model's tokens, from pools of a rank's heads."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import batching as spmd

TIMEOUT = 420


def test_requests_that_come_and_go() -> None:
    """Programs for prompts alone, with what was cached, and of a token for that which is left last."""
    for found in run_spmd(spmd.batches, 2, "two_kv_heads", 1, "sdpa", spmd.PROMPTS, 2, timeout=TIMEOUT):
        assert found == {"same": [True, True], "programs": [3, 0], "heads": {1}}


def test_windows() -> None:
    """A layer that looks back as far as its window, and one that sees all, with sinks."""
    for found in run_spmd(spmd.batches, 2, "gpt_oss", 2, "eager", spmd.PROMPTS[:3], 1, timeout=TIMEOUT):
        assert found == {"same": [True], "programs": [2], "heads": {2}}


def test_one_key_head() -> None:
    """All ranks hold it."""
    for found in run_spmd(spmd.batches, 2, "one_kv_head", 1, "sdpa", spmd.PROMPTS[:2], 1, timeout=TIMEOUT):
        assert found["same"] == [True] and found["heads"] == {1}


def test_a_manager(tmp_path: Path) -> None:
    each = run_spmd(spmd.managed, 2, str(tmp_path), timeout=TIMEOUT)
    assert each[0]["drawn"] == each[1]["drawn"]
    assert each[0]["sampled"], "of which another rank's unsharded model draws others"
    for found in each:
        assert found["one by one"] and found["threads"] == []
        assert all("another thread is in a call" in said for said in found["meanwhile"])
        assert found["in a pause"] == ["accepted", "accepted"]
        assert "nor when it was saved" in found["loaded"]
        assert found["after"] <= 1e-5


def test_replicas() -> None:
    """A batch finds nothing of an earlier one's group."""
    assert run_spmd(spmd.replicas, 4, timeout=TIMEOUT) == [[True, True]] * 4


def test_refusals() -> None:
    expected = [
        "different calls of generate_batch",
        "keep a manager",
        "compile its steps",
        "compile its steps",
        *["to ranks that follow"] * 3,
        "the attention 'flex_attention'",
    ]
    for messages in run_spmd(spmd.refusals, 2, timeout=TIMEOUT):
        for message, part in zip(messages, expected, strict=True):
            assert part in message


def test_adapters() -> None:
    for said in run_spmd(spmd.adapters, 2, timeout=TIMEOUT):
        assert len(said) == 12 and all("not in a model of PEFT" in each for each in said), said


def test_a_rank_that_fails() -> None:
    """All hear of it: the others wait for it as long as they wait for any rank."""
    first, second = run_spmd(spmd.one_fails, 2, 3, timeout=TIMEOUT)
    assert "RanksApart" in first
    assert "no more steps" in second

"""Generating on ranks whose clocks, streamers and callbacks differ: they stop together, or say why not."""

from __future__ import annotations

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import steering


def test_ranks_are_steered_alike() -> None:
    first, second = run_spmd(steering.steered, 2, timeout=300)
    for found in (first, second):
        assert found["streamed"] and found["in any order"] and found["criteria"] and found["afterwards"]
        assert "say different things" in found["processors differ"]
        assert "say different things" in found["allowed tokens differ"]
        assert "rank 0 has 'min_length: 0', rank 1 has 'min_length: 1'" in found["lengths differ"]
        assert "different calls of generate" in found["defaults differ"]
        assert found["beams cannot be streamed"] == "ValueError"
    assert first["seen"] == (5 + steering.NEW, True) and second["seen"] is None
    assert first["clock"] == second["clock"] < 5 + steering.NEW
    for name, what in (
        ("streamer fails", "go on generating: BrokenPipeError"),
        ("criterion fails", "go on generating: KeyError"),
        ("processor fails", "process logits: KeyError"),
    ):
        assert f"rank 1 failed to {what}" in first[name]
        assert second[name].startswith("itself ")


def test_one_rank_streams_too() -> None:
    assert run_spmd(steering.streamed_by_one, 1) == [(5 + steering.NEW, True)]

"""One rank calls a sharded model, and the others follow."""

from __future__ import annotations

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import serving as spmd


def test_the_others_follow() -> None:
    leader, other = run_spmd(spmd.served, 2)
    assert other["led"] == 1
    assert max(leader["call"], leader["submodule"], leader["inference"]) <= 1e-6
    assert max(leader["after"], other["after"]) <= 1e-6
    assert leader["tokens"] and leader["sampled"] and leader["threads"] and leader["still"]
    assert leader["streamed"] == 5, "the prompt, and four tokens"
    assert "records gradients" in leader["gradients"]
    assert "every rank has its own heads" in leader["cache"]
    assert "cannot be captured" in leader["failed"]


def test_what_the_leader_alone_changes() -> None:
    said, other = run_spmd(spmd.differently, 2)
    assert other == {}
    assert "programs for a served call" in said["changed"]
    assert "would not copy the model" in said["copied"]
    assert "follow already" in said["nested"]
    assert "cannot be told of this call" in said["unknown"]


def test_one_that_fails() -> None:
    leader, other = run_spmd(spmd.one_fails, 2)
    assert other == []
    assert len(leader) == 2 and all(
        "rank 1 failed to serve a call: FileNotFoundError" in said for said in leader
    )

"""``sharded.verify``: a model on its mesh, against the model that its ranks' weights make up."""

from __future__ import annotations

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import verify


def test_live() -> None:
    """What is right, and what is wrong on one rank only, which every rank hears of."""
    for found in run_spmd(verify.live, 2):
        right = found["right"]
        assert right.ok
        assert {f.sort for f in right.findings} == {"result", "buffer", "gradient"}
        assert found["seen"] == 0
        assert not found["gradients left"]
        for later in found["later"]:
            assert later.ok, later
            assert len(later.findings) == len(right.findings)
        for what in ("wrong on one rank", "hook on one rank"):
            wrong = found[what]
            assert (wrong.ok, wrong.kind) == (False, "execution")
            assert wrong.wrong[0].ranks == 1
        assert "different calls of verify" in found["other values"]
        assert "gradients True" in found["other gradients"]
        assert "misses the argument" in found["no call"]
        assert "generate is -1" in found["no tokens"]


def test_weights_that_differ() -> None:
    for refusal in run_spmd(verify.weights_that_differ, 2):
        assert "different weights" in refusal
        assert "last.bias" in refusal


def test_tokens() -> None:
    for report in run_spmd(verify.generating, 2):
        assert report.ok, report
        assert {f.sort for f in report.findings} >= {"result", "gradient", "token"}

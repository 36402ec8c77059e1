"""Faults of which the proof can't know: ranks that compare, or verify, catch them.

``benchmarks/faults.py`` does this with many models; faults in rewritten graphs are in
``test_verify_placements``.
"""

from __future__ import annotations

from benchmarks.faults import Bench
from tests.helpers.faults import FAULTS

ELSEWHERE = tuple(f"graph: {kind}" for kind in FAULTS) + ("every rank: ", "rule: ")


def test_faults_in_a_small_program() -> None:
    """What is called equal was run, and has changed neither a result nor a gradient."""
    bench = Bench("packed")
    found = [(kind, run()) for kind, run in bench.mutants(1) if not kind.startswith(ELSEWHERE)]
    by_outcome = {o: {kind for kind, outcome in found if outcome == o} for _, o in found}
    assert by_outcome["ranks"] >= {"one rank: collective left out", "one rank: gradients not summed up"}
    for kind in (
        "graph: an older value",
        "one rank: dimensions exchanged",
        "slices: off by one",
        "slices: another rank's",
        "slices: segments swapped",
        "slices: heads or experts in another order",
        "slices: scaled",
        "capture: a call left out",
        "capture: a gradient stops",
    ):
        assert kind in by_outcome["verify"]
    assert "missed" not in by_outcome
    assert bench.outcome(lambda: bench.right) == "equal", "a fault was left behind"

"""Faults of which the proof can't know: ranks that compare, or verify, catch them.

``benchmarks/faults.py`` does this with many models; faults in rewritten graphs are in
``test_verify_placements``.
"""

from __future__ import annotations

import pytest

from benchmarks.fault_subjects import FAMILIES
from benchmarks.faults import Bench
from tests.helpers import families
from tests.helpers.local_faults import RULES
from tpcompile.rules.notation import parse_row

CAUGHT = {
    "one rank: collective left out": "ranks",
    "one rank: gradients not summed up": "ranks",
    "graph: an older value": "verify",
    "graph: a gradient stops for one use": "verify",
    "graph: half of a gradient": "verify",
    "graph: said to be whole": "proof",
    "graph: stored otherwise": "proof",
    "graph: segments taken for each other": "proof",
    "one rank: dimensions exchanged": "verify",
    "one rank: zeros are sent": "verify",
    "ranks: all run the program of the first": "verify",
    "slices: off by one": "verify",
    "slices: another rank's": "verify",
    "slices: segments swapped": "verify",
    "slices: heads or experts in another order": "verify",
    "slices: a head or rows of another expert": "verify",
    "slices: scaled": "verify",
    "capture: a call left out": "verify",
    "capture: a gradient stops": "verify",
    "capture: a hook dropped": "verify",
    "capture: a custom backward dropped": "verify",
    "capture: a buffer is not written": "verify",
    "layers: the weights of the layer before": "verify",
}


ELSEWHERE = {
    "packed": {"ranks: all run the program of the first": "equal"},  # as no rank says which it is
    "hooks and a backward": {"capture: a gradient stops": "equal"},  # of a buffer, which has none
    # Layers that are no longer alike cannot stand for each other.
    "repeated layers": {kind: "lowering" for kind in CAUGHT if kind.startswith("graph: a")},
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_faults_in_a_small_program(name: str) -> None:
    """What is called equal was run, and has changed neither a result nor a gradient."""
    bench = Bench(name)
    mutants = [(kind, run) for kind, run in bench.mutants(1) if kind in CAUGHT]
    found = {kind: run() for kind, run in mutants}
    assert found == {kind: (CAUGHT | ELSEWHERE[name])[kind] for kind in found}
    assert len(found) >= 10
    assert bench.outcome(lambda: bench.right) == "equal", "a fault was left behind"


def test_a_key_head_of_another_group() -> None:
    """Four ranks, two key heads: a rank that holds the other one."""
    bench = Bench("gqa below the ranks")
    found = [run() for kind, run in bench.mutants(8) if kind == "slices: kv head of another group"]
    assert "verify" in found
    assert set(found) <= {"verify", "equal"}


def test_what_the_bench_needs_is_there() -> None:
    """Its models exist, and its wrong rules are rules: a row that is refused shows nothing."""
    assert set(FAMILIES) <= set(families.FAMILIES)
    for rows in RULES.values():
        for row in rows.values():
            parse_row(row)

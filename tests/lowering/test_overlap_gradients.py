"""Messages of gradients travel beside matmuls of weights' gradients; what is gathered need not be kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import tpcompile
from tests.helpers import programs, toys
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import overlap
from tpcompile.ir.print_graph import graph_text
from tpcompile.lowering.lower_graph import lower_program
from tpcompile.lowering.simulate import SimulatedGroups
from tpcompile.pipeline import rewrite


@pytest.mark.parametrize("sequence", [False, True], ids=["whole", "positions"])
def test_text(golden: Callable[[str, str], None], sequence: bool) -> None:
    """Layers that read one value are one call with what brings it there, in the form for gradients only."""
    work = programs.planned(toys.Blocks(), torch.randn(3, 8, 12), ranks=2, dynamic=False)
    rewrite(work, training=True, sequence=sequence)
    lowered = lower_program(work, (0,), SimulatedGroups((2,), (0,)))
    assert "_linears" not in graph_text(lowered.local.graph)
    assert lowered.training is not None
    golden(f"overlap_gradients_{'positions' if sequence else 'whole'}", graph_text(lowered.training.graph))


def test_on_ranks() -> None:
    for found in run_spmd(overlap.ways, 2):
        refusal = found.pop("twice")
        assert "second derivatives" in refusal
        assert found.pop("nothing") == ((0, overlap.LENGTH, overlap.WIDE), 0.0)
        for name, (result, gradients, _, _, _) in found.items():
            assert result <= 1e-12 and gradients <= 1e-12, name
        # Each block: the gradient in front of "down" (m), its weight's (m); the gradient of what three layers
        # read (mmm), its message begins (R), two weights' gradients (mm), and it is waited for (w).
        _, _, order, _, recomputed = found["whole"]
        assert order == "mmmmmRmmw" * 2 and not recomputed
        # The second block's message is a reduce-scatter of positions.
        _, _, order, kept, _ = found["positions"]
        assert "mmmSmmw" in order
        _, _, order, kept_again, recomputed = found["again"]
        # What it reads is gathered meanwhile, and not kept: what is kept of this size is the first block's.
        assert "GmmmSwmmw" in order
        assert kept_again < kept and recomputed == ("what linear layers gather (1)",)
        assert found["again, compiled"][2].count("G") == order.count("G")


def test_nothing_to_gather_again() -> None:
    """Without sequence parallelism the plan says that the option does nothing."""
    plan = tpcompile.plan(overlap.Model(), 2, (torch.zeros(2, 4, overlap.WIDE),), checkpointing="gathered")
    assert not plan.recomputed and any("nothing is gathered again" in note for note in plan.notes)

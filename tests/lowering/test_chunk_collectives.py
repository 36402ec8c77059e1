"""Collectives of positions in the form that Inductor knows: the text, and the same bits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.helpers import programs, toys
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import symmetric_memory
from tpcompile.ir.print_graph import graph_text
from tpcompile.lowering.chunk_collectives import chunk_collectives
from tpcompile.lowering.lower_graph import lower_program
from tpcompile.lowering.simulate import SimulatedGroups
from tpcompile.pipeline import rewrite


def test_text(golden: Callable[[str, str], None]) -> None:
    work = programs.planned(toys.Blocks(), torch.randn(3, 8, 12), ranks=2, dynamic=False)
    rewrite(work, training=True, sequence=True)
    training = lower_program(work, (0,), SimulatedGroups((2,), (0,))).training
    assert training is not None
    assert chunk_collectives(training.graph)
    golden("chunk_collectives_positions", graph_text(training.graph))


def test_without_divided_positions_nothing_changes() -> None:
    work = programs.planned(toys.Blocks(), torch.randn(3, 8, 12), ranks=2, dynamic=False)
    rewrite(work, training=True)
    local = lower_program(work, (0,), SimulatedGroups((2,), (0,))).local
    before = graph_text(local.graph)
    assert not chunk_collectives(local.graph) and graph_text(local.graph) == before


def test_the_same_bits() -> None:
    """Forward and gradients, of lengths that the ranks divide and that they do not, along any dimension."""
    for found in run_spmd(symmetric_memory.chunked, 2):
        # Two reduce-scatters, what the second block reads, and the result.
        assert set(found.values()) == {(True, 4)} and len(found) == 4

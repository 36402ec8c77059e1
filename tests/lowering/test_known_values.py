"""What one rank's calls give is known for the next: less is computed, and nothing is different."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph

from tests.helpers import programs
from tpcompile.ir import graph_edit
from tpcompile.lowering import known_values, simulate
from tpcompile.lowering.lower_graph import lower_program
from tpcompile.pipeline import rewrite
from tpcompile.planner.global_program import GlobalProgram


class Gated(nn.Module):
    """Views, a product of two values that are computed alike, and an integer beside a float."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(8, width), nn.Linear(8, width)
        self.down = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu() * self.gate(x).relu()
        return self.down(hidden.flatten(0, 1)).unflatten(0, (x.shape[0], -1)) * 1 + 1.0


def rewritten(width: int, ranks: int) -> GlobalProgram:
    program = programs.planned(Gated(width), torch.randn(2, 64, 8), ranks=ranks, dynamic=True)
    rewrite(program, training=False)
    return program


def described(graph: Graph) -> list[Any]:
    """Every value with its type, sizes, strides, and the first value that it shares its memory with."""
    first: dict[int, int] = {}
    found: list[Any] = []
    for at, node in enumerate(graph.nodes):
        val = node.meta.get("val")
        if isinstance(val, Tensor):
            memory = first.setdefault(val.untyped_storage()._cdata, at)
            found.append((str(node), val.dtype, str(val.shape), str(val.stride()), memory))
    return found


@pytest.mark.parametrize(("width", "ranks"), [(16, 2), (15, 2), (14, 4)])
def test_nothing_is_different(width: int, ranks: int) -> None:
    program = rewritten(width, ranks)
    every = simulate.coordinates(program.axis_sizes)
    for at, known in zip(every, simulate.lower_all(program), strict=True):
        alone = lower_program(program, at, simulate.SimulatedGroups(program.axis_sizes, at)).local
        assert str(known.graph) == str(alone.graph)
        assert described(known.graph) == described(alone.graph)


@pytest.mark.parametrize(("width", "ranks"), [(16, 2), (16, 4)])
def test_ranks_with_equal_parts_are_computed_once(
    width: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def value_of(*args: Any) -> Any:
        counted.append(args[0])
        return graph_edit.value_of(*args)

    monkeypatch.setattr(known_values, "value_of", value_of)
    program = rewritten(width, ranks)
    at = simulate.coordinates(program.axis_sizes)[0]
    lower_program(program, at, simulate.SimulatedGroups(program.axis_sizes, at))
    alone = len(counted)
    simulate.lower_all(program)
    together = counted[alone:]
    # But for the call that says which rank this is.
    other = torch.ops.tpcompile.keep_first.default
    assert together.count(other) == ranks
    assert len(together) - ranks == alone - 1 > 10

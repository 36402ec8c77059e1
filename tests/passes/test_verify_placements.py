"""The proof of placements: what the passes make is proved, and what a fault makes of it is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import programs, toys
from tests.helpers.faults import FAULTS
from tests.whole.test_families_simulated import followed
from tpcompile.errors import TpCompileError
from tpcompile.ir.placements import P, Shard
from tpcompile.passes.verify_placements import verify_placements
from tpcompile.pipeline import canonical, rewrite
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.rules.assignment import Assignment
from tpcompile.rules.choices import choices

X12, X20 = (3, 4, 12), (3, 4, 20)
TOYS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]], int, bool]] = {
    "mlp": (toys.Mlp, [X12], 2, False),
    "attention": (lambda: toys.Attention(False), [X20], 2, False),
    "packed": (lambda: toys.Attention(True), [X20], 2, False),
    "parallel": (toys.Parallel, [X20], 2, False),
    "tower": (toys.Tower, [(3, 12), (3, 14)], 2, False),
    "norms": (lambda: toys.NormedHeads(heads=8, groups=2), [X20], 4, False),
    "blocks in sequence": (toys.Blocks, [X12], 2, True),
}


@functools.lru_cache(maxsize=1)
def _planned(name: str) -> tuple[GlobalProgram, GlobalProgram, nn.Module, list[Any], list[Tensor]]:
    module, shapes, ranks, _ = TOYS[name]
    torch.manual_seed(0)
    model = module().double().eval()
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    captured = programs.captured(model, *inputs, ranks=ranks)
    base = canonical(captured.captured, ranks)
    wanted = model(*inputs)
    wanted = [wanted] if isinstance(wanted, Tensor) else list(wanted)
    return base, programs.planned_work(captured), model, inputs, wanted


def rewritten_toy(name: str) -> GlobalProgram:
    base, planned, *_ = _planned(name)
    program = followed(base, planned)
    rewrite(program, training=True, sequence=TOYS[name][3])
    return program


def _runs_right(program: GlobalProgram, name: str) -> bool:
    """Whether results and gradients are those of the module, on simulated ranks."""
    _, _, model, inputs, wanted = _planned(name)
    try:
        for results in programs.run_ranks(program, model, *inputs):
            torch.testing.assert_close(results, wanted, rtol=1e-9, atol=1e-9)
        programs.gradients_agree(program, model, *inputs)
    except Exception:  # a fault may fail in any way; here it counts that it does
        return False
    return True


@pytest.mark.parametrize("name", TOYS)
def test_faults(name: str) -> None:
    """Each fault is refused, or changes neither a result nor a gradient."""
    right = rewritten_toy(name)
    assert _runs_right(rewritten_toy(name), name)
    refused, missed = 0, []
    for kind, fault in FAULTS.items():
        for at in range(sum(1 for _ in fault(right))):
            program = rewritten_toy(name)
            list(fault(program))[at]()
            try:
                verify_placements(program, training=True)
            except TpCompileError:
                refused += 1
                continue
            if not _runs_right(program, name):
                missed.append(f"{kind}, place {at}")
    assert not missed
    assert refused >= 3, "hardly a fault could be put into this program"


class Centred(nn.Module):
    """A mean over what a matmul gives."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).mean(-1)


@pytest.mark.parametrize("summands", [True, False])
def test_the_way_that_is_noted_is_the_one_that_is_proved(summands: bool) -> None:
    """Lowering divides by the whole size where a mean is noted to be over parts, else by the parts' own."""
    base = canonical(programs.captured(Centred().double(), torch.randn(X12, dtype=torch.float64)).captured, 2)
    factors = base.decided = base.factors()
    linear, mean = (node for node in base.graph.nodes if node.op == "call_function")
    ways = {node: choices(node, factors, lambda _: True, (2,)) for node in (linear, mean)}
    divided = {node: next(c for c in ways[node] if Shard(2) in (*c.inputs, *c.outputs)) for node in ways}
    base.decisions.append(Assignment(2, divided, dict.fromkeys(base.params(), Shard(0))))
    rewrite(base, training=False)
    mean.meta["choices"] = (next(c for c in ways[mean] if c.inputs == (P,)) if summands else None,)
    with pytest.raises(TpCompileError, match="to be computed as"):
        verify_placements(base, training=False)

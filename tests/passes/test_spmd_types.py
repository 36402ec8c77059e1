"""Another type system about the same programs: what it has to say of right ones, and of faults in them."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
import torch
from spmd_types import SpmdTypeError

from tests.helpers import families
from tests.helpers.faults import FAULTS
from tests.helpers.spmd_judge import judge
from tests.passes.test_verify_placements import TOYS, rewritten_toy
from tests.whole.test_families_simulated import captured, followed
from tpcompile.capture.export.capture_model import capture
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import bind_call
from tpcompile.pipeline import canonical, plan_program, rewrite
from tpcompile.planner.search.cost import preset

DIMENSIONS = {"segments swapped", "shard of another dimension", "all-to-all to another dimension"}
"""What the library's local types can't see: they say that a value varies, not along which dimension."""


@pytest.fixture(autouse=True)
def _quiet() -> None:
    """A fault that does not fit is logged by torch with all of its stack."""
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
    torch.manual_seed(0)


@pytest.mark.parametrize("name", TOYS)
def test_faults_are_complained_about(name: str) -> None:
    """Of a program as it is there is no complaint; of each fault in it that can be lowered there is one."""
    right = rewritten_toy(name)
    judge(rewritten_toy(name))
    found, unseen = Counter[str](), set[str]()
    for kind, fault in FAULTS.items():
        for at in range(min(2, sum(1 for _ in fault(right)))):
            program = rewritten_toy(name)
            list(fault(program))[at]()
            try:
                judge(program)
            except SpmdTypeError:
                found["complained about"] += 1
            except TpCompileError:  # its parts do not fit
                found["not lowered"] += 1
            else:
                unseen.add(kind)
    assert unseen <= DIMENSIONS
    assert found["complained about"] >= 2


# Experts, and a packed projection with tied embeddings. All families were judged so once.
@pytest.mark.parametrize(("name", "ranks", "sequence"), [("mixtral", 4, True), ("gpt2", 2, False)])
def test_families(name: str, ranks: int, sequence: bool) -> None:
    base = captured(name)[1]
    base.ranks = ranks
    program = followed(base, plan_program(base, preset("cpu"), lambda _work, _axis: {}))
    rewrite(program, training=True, sequence=sequence)
    judge(program)


# A recurrence, which is unrolled over the positions, and an encoder beside a decoder: three positions do.
@pytest.mark.parametrize("name", ["mamba", "t5"])
def test_families_of_few_positions(name: str) -> None:
    call = bind_call(model := families.build(name), (), families.inputs(name, 2, 3))
    base = canonical(capture(model, call, dynamic=False), 2)
    program = followed(base, plan_program(base, preset("cpu"), lambda *_: {}))
    rewrite(program, training=True)
    judge(program)

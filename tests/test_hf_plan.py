"""Models' own plans: honoured, right, and only as poor as they have to be."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import tpcompile
from tests import families, simulate
from tests.test_families_simulated import CAPTURED, assert_equal_to_whole, captured, inputs
from tpcompile import TpCompileError
from tpcompile.decisions import decisions_from_data, decisions_to_data
from tpcompile.pins import make_pins
from tpcompile.pipeline import plan_program, rewrite, split_copy
from tpcompile.planner.cost import preset
from tpcompile.strategies.read_rules import read_rules
from tpcompile.work import Work

# Families whose class or config has a table; the others say so.
WITHOUT = {"gpt2", "bloom", "opt", "gptj", "gpt_neox", "stablelm", "mamba", "vit"}


def has_plan(name: str) -> bool:
    model = families.build(name)
    try:
        return bool(tpcompile.hf_plan(model))
    except TpCompileError:
        return False


def with_rules(name: str, rules: Any, ranks: int, own: bool = False) -> tuple[nn.Module, Work]:
    """A family with its program, rewritten for a plan's rules."""
    model, base = captured(name)
    base.ranks = ranks
    wishes = read_rules(model, rules, own=own).wishes
    planned = plan_program(base, preset("cpu"), make_pins(wishes))
    work = split_copy(base, planned.split_groups)
    decisions_from_data(work, decisions_to_data(planned))
    rewrite(work, training=False)
    return model, work


@pytest.mark.parametrize("name", families.FAMILIES)
def test_family_with_its_own_plan(name: str) -> None:
    model = captured(name)[0]
    try:
        plan = tpcompile.hf_plan(model)
    except TpCompileError as error:
        pytest.skip(str(error))
    model, work = with_rules(name, plan, 2, own=True)
    share = assert_equal_to_whole(model, work, simulate.lower_all(work), inputs(name, CAPTURED))
    print(name, share)

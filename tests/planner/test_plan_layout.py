"""The layout of the weights over several programs: what one has decided, all others keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tpcompile
from tests.helpers.toys import Mlp
from tpcompile.compile_program import Compiled, Compiler
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import bind_call
from tpcompile.planner.options import Options
from tpcompile.planner.plan import Plan
from tpcompile.planner.plan_layout import check_layout
from tpcompile.planner.search.cost import PRESETS

X = torch.randn(3, 8)


class Ways(nn.Module):
    """Uses a weight not at all, in one piece, or in two."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.packed = nn.Parameter(torch.randn(32, 8))
        self.down, self.down_whole = nn.Linear(16, 8, bias=False), nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor, way: str = "none") -> Tensor:
        h = self.first(x)
        if way == "none":
            return h
        packed = functional.linear(h, self.packed)
        if way == "whole":
            return self.down_whole(packed.relu())
        gate, up = packed.chunk(2, -1)
        return self.down(gate.sigmoid() * up)


def compiled(plan: Plan, *ways: str) -> list[Compiled]:
    """Programs for some calls, one after the other."""
    model, compiler = Ways(), Compiler(Options(PRESETS["h100"], plan=plan), 2)
    found: list[Compiled] = []
    for way in ways:
        call = bind_call(model, (X, way) if way != "none" else (X,), None)
        found.append(compiler.compile(model, call, found[-1].plan.layout if found else None))
    return found


def held(program: Compiled, name: str) -> str:
    """How a program has a weight."""
    node = next(n for n, param in program.planned.params().items() if param == name)
    return str(program.planned.decisions[0].params[node])


@pytest.mark.parametrize("ways", [("none", "whole", "halves"), ("none", "halves", "whole")])
def test_what_a_plan_leaves_open_is_decided_once(ways: tuple[str, ...]) -> None:
    programs = compiled(tpcompile.plan(Ways(), 2, (X,)), *ways)
    first, second = (held(program, "packed") for program in programs[1:])
    assert first == second == ("S(0)" if ways[1] == "whole" else "S(0/1)")


def test_a_plan_decides_what_the_first_call_does_not_use() -> None:
    plan = tpcompile.plan(Ways(), 2, (X, "halves"))
    programs = compiled(plan, "none", "whole")
    assert held(programs[1], "packed") == "S(0/1)"
    assert programs[1].plan.layout.params["packed"] == plan.layout.params["packed"]


def test_decisions_for_weights_that_lie_otherwise_are_refused() -> None:
    plan = tpcompile.plan(Ways(), 2, (X,))
    whole, halves = (compiled(plan, "none", way)[1] for way in ("whole", "halves"))
    other = replace(halves.planned, layout=whole.plan.layout)
    with pytest.raises(TpCompileError, match=r"as S\(0/1\), it is held as S\(0\)"):
        check_layout(other, whole.plan.layout)
    check_layout(replace(halves.planned, layout=halves.plan.layout), halves.plan.layout)


def test_a_plan_names_ranks_that_have_no_part() -> None:
    text = str(tpcompile.plan(Mlp(), 32, (torch.zeros(2, 3, 12),)))
    assert "note: no part of up.weight on ranks 20\N{EN DASH}31 of 32" in text
    assert "note: no part of down.weight on ranks 20\N{EN DASH}31 of 32" in text
    assert "no part of" not in str(tpcompile.plan(Mlp(), 4, (torch.zeros(2, 3, 12),)))

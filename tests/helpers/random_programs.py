"""Small random programs: linear layers, sums, products and norms, wired at random."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from tests.helpers import programs
from tpcompile.capture.export.specs import OutputSpec
from tpcompile.ir.graph_edit import call
from tpcompile.planner.global_program import GlobalProgram

aten = torch.ops.aten
WIDTHS = (6, 10)


class Weights(nn.Module):
    """Weights between all widths, all of them used, so that capture keeps them."""

    def __init__(self, copies: int = 2) -> None:
        super().__init__()
        self.linears = nn.ModuleDict(
            {f"{a}_{b}_{i}": nn.Linear(a, b) for a in WIDTHS for b in WIDTHS for i in range(copies)}
        )
        self.inputs = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        given = {6: x, 10: y}
        found: Tensor = self.inputs * sum(
            m(given[int(k.split("_")[0])]).sum() for k, m in self.linears.items()
        )
        return found


torch.manual_seed(0)
MODEL = Weights().double()
INPUTS = [torch.randn(2, 3, width, dtype=torch.float64) for width in WIDTHS]
_BASE = programs.captured(MODEL, *INPUTS)


def random_program(seed: int, calls: int, ranks: int) -> GlobalProgram:
    """A program of about so many calls; every value that nothing uses is returned."""
    rng = random.Random(seed)
    program = _BASE.copy()
    graph, out = program.graph, program.graph.output_node()
    by_name = {s.spec.name: n for n, s in program.sources.items()}
    values = [n for n, s in program.sources.items() if s.spec.kind == "user"]
    old = [n for n in graph.nodes if n.op == "call_function"]
    fresh = list(MODEL.linears)
    rng.shuffle(fresh)
    made: list[Node] = []

    def add(target: Any, *args: Any) -> None:
        with graph.inserting_before(out):
            made.append(call(graph, target, args, like=out))
        values.append(made[-1])

    while len(made) < calls:
        kind = rng.choice(["linear", "linear", "add", "mul", "relu", "norm"])
        a = rng.choice(values[-4:])
        width = a.meta["val"].shape[-1]
        if kind == "linear":
            fitting = [k for k in fresh if k.startswith(f"{width}_")]
            if fitting:
                fresh.remove(fitting[0])
                weight, bias = (by_name[f"linears.{fitting[0]}.{p}"] for p in ("weight", "bias"))
                add(aten.linear.default, a, weight, *([bias] if rng.random() < 0.5 else []))
        elif kind == "relu":
            add(aten.relu.default, a)
        elif kind == "norm":
            add(aten.mean.dim, a, [-1], True)
            add(aten.add.Tensor, values[-1], a)
        else:
            b = rng.choice([v for v in values if v.meta["val"].shape[-1] == width])
            add(aten.add.Tensor if kind == "add" else aten.mul.Tensor, a, b)
    results = tuple(n for n in made if not n.users)
    out.args = (results,)
    for node in reversed(old):
        graph.erase_node(node)
    outputs = tuple(OutputSpec("user", n.name) for n in results)
    return replace(program, captured=replace(program.captured, outputs=outputs), ranks=ranks)

"""Captured toy programs, planned and run: whole on one rank, or divided in lockstep on simulated ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tpcompile.capture.export.capture_model import capture
from tpcompile.ir.calls import bind_call, flatten_call
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.lowering import simulate
from tpcompile.pipeline import canonical, plan_program
from tpcompile.planner.decide import Pins
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.planner.plan_layout import layout_of
from tpcompile.planner.search.cost import PRESETS, CostModel
from tpcompile.runtime.verify.inputs import Inputs, undivided


def captured(
    model: nn.Module, *args: Any, ranks: int = 2, dynamic: Any = False, **kwargs: Any
) -> GlobalProgram:
    """The program of one call, as captured."""
    return GlobalProgram(capture(model, bind_call(model, args, kwargs), dynamic=dynamic), ranks)


def canonicalised(model: nn.Module, *args: Any, **options: Any) -> GlobalProgram:
    """The program of one call, in its canonical form."""
    program = captured(model, *args, **options)
    return canonical(program.captured, program.ranks)


def no_pins(program: GlobalProgram, axis: int) -> dict[Any, Any]:
    """Every placement is allowed."""
    return {}


def planned(
    model: nn.Module, *args: Any, cost: CostModel = PRESETS["cpu"], pins: Pins = no_pins, **options: Any
) -> GlobalProgram:
    """The planned program of one call; nothing is rewritten for the plan yet."""
    return planned_work(captured(model, *args, **options), cost, pins)


def planned_work(
    program: GlobalProgram, cost: CostModel = PRESETS["cpu"], pins: Pins = no_pins
) -> GlobalProgram:
    """A captured program, planned."""
    return plan_program(canonical(program.captured, program.ranks), cost, pins)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its name, tied ones under each of theirs."""
    params = dict(model.named_parameters(remove_duplicate=False))
    return params | dict(model.named_buffers(remove_duplicate=False))


def run_whole(program: GlobalProgram, model: nn.Module, *args: Any, **kwargs: Any) -> list[Any]:
    """Runs the graph as it is, at global shapes, where markers are identities."""
    inputs = _inputs(program, model, undivided(program, model), 0, args, kwargs)
    return list(_interpret(program, inputs))


def run_ranks(
    program: GlobalProgram,
    model: nn.Module,
    *args: Any,
    lowered: list[GraphModule] | None = None,
    **kwargs: Any,
) -> list[list[Any]]:
    """Lowers a rewritten program for every rank and runs all in lockstep; the results by rank."""
    layout, programs = layout_of(program, tensors_of(model)), lowered or simulate.lower_all(program)
    inputs = [
        _inputs(program, model, layout, rank, args, kwargs).of(local.graph)
        for rank, local in enumerate(programs)
    ]
    return [list(results) for results in simulate.run(program, inputs, programs)]


def gradients_agree(program: GlobalProgram, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Each rank's gradients are its parts of the undivided program's.

    The loss is a sum of all results, weighted at random, which every rank computes.
    """

    def loss(results: list[Any]) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        weighted = [(r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results]
        return torch.stack(weighted).sum()

    whole = _inputs(program, model, undivided(program, model), 0, args, kwargs, learning=True)
    loss(list(_interpret(program, whole))).backward()
    layout, programs = layout_of(program, tensors_of(model)), simulate.lower_all(program)
    ranks = [_inputs(program, model, layout, r, args, kwargs, learning=True) for r in range(layout.ranks)]
    given = [mine.of(local.graph) for local, mine in zip(programs, ranks, strict=True)]
    torch.stack([loss(list(results)) for results in simulate.run(program, given, programs)]).sum().backward()
    for rank, mine in enumerate(ranks):
        for (kind, name), full in whole.gradients().items():
            wanted = layout.shard(name, full, rank) if kind in ("param", "buffer") else full
            value = mine.given[kind, name]
            got = torch.zeros_like(value) if value.grad is None else value.grad
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def _inputs(
    program: GlobalProgram,
    model: nn.Module,
    layout: WeightLayout,
    rank: int,
    args: Any,
    kwargs: dict[str, Any],
    learning: bool = False,
) -> Inputs:
    leaves, _ = flatten_call(bind_call(model, args, kwargs))
    return Inputs(model, program.captured, leaves, layout, rank, learning)


def _interpret(program: GlobalProgram, inputs: Inputs) -> tuple[Any, ...]:
    values = [inputs.value(program.sources[n]) for n in program.graph.find_nodes(op="placeholder")]
    results: tuple[Any, ...] = torch.fx.Interpreter(program.captured.graph_module, graph=program.graph).run(
        *values
    )
    return results

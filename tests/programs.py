"""Captured toy programs, planned and run: whole on one rank, or divided in lockstep on simulated ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tests import simulate
from tpcompile.capture import bind_call, capture, flatten_call
from tpcompile.layout import WeightLayout
from tpcompile.pipeline import canonical, plan_program
from tpcompile.plan_layout import layout_of
from tpcompile.planner.cost import PRESETS, CostModel
from tpcompile.planner.decide import Pins
from tpcompile.work import Source, Work


def captured(model: nn.Module, *args: Any, ranks: int = 2, dynamic: Any = False, **kwargs: Any) -> Work:
    """The program of one call, as captured."""
    return Work(capture(model, bind_call(model, args, kwargs), dynamic=dynamic), ranks)


def canonicalised(model: nn.Module, *args: Any, **options: Any) -> Work:
    """The program of one call, in its canonical form."""
    work = captured(model, *args, **options)
    return canonical(work.captured, work.ranks)


def no_pins(work: Work, axis: int) -> dict[Any, Any]:
    """Every placement is allowed."""
    return {}


def planned(
    model: nn.Module, *args: Any, cost: CostModel = PRESETS["cpu"], pins: Pins = no_pins, **options: Any
) -> Work:
    """The planned program of one call; nothing is rewritten for the plan yet."""
    return planned_work(captured(model, *args, **options), cost, pins)


def planned_work(work: Work, cost: CostModel = PRESETS["cpu"], pins: Pins = no_pins) -> Work:
    """A captured program, planned."""
    return plan_program(canonical(work.captured, work.ranks), cost, pins)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its name, tied ones under each of theirs."""
    params = dict(model.named_parameters(remove_duplicate=False))
    return params | dict(model.named_buffers(remove_duplicate=False))


def run_whole(work: Work, model: nn.Module, *args: Any, **kwargs: Any) -> list[Any]:
    """Runs the graph as it is, at global shapes, where markers are identities."""
    alone = replace(work, decisions=[], planned_factors=work.factors())
    inputs = _feed(alone, model, _undivided(alone, model), 0, args, kwargs)
    return list(torch.fx.Interpreter(work.captured.graph_module, graph=work.graph).run(*inputs))


def run_ranks(
    work: Work, model: nn.Module, *args: Any, lowered: list[GraphModule] | None = None, **kwargs: Any
) -> list[list[Any]]:
    """Lowers a rewritten program for every rank and runs all in lockstep; the results by rank."""
    layout = layout_of(work, tensors_of(model))
    inputs = [_feed(work, model, layout, rank, args, kwargs) for rank in range(layout.ranks)]
    return [list(results) for results in simulate.run(work, inputs, lowered)]


def gradients_agree(work: Work, model: nn.Module, *args: Any) -> None:
    """Each rank's gradients are its parts of the undivided program's.

    The loss is a sum of all results, weighted at random, which every rank computes.
    """
    layout = layout_of(work, tensors_of(model))

    def loss(results: list[Any]) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        weighted = [(r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results]
        return torch.stack(weighted).sum()

    def leaves(inputs: list[Any]) -> list[Any]:
        return [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]

    nodes = work.graph.find_nodes(op="placeholder")
    whole = leaves(_feed(replace(work, decisions=[]), model, _undivided(work, model), 0, args, {}))
    interpreter = torch.fx.Interpreter(work.captured.graph_module, graph=work.graph)
    loss(list(interpreter.run(*whole))).backward()
    ranks = [leaves(_feed(work, model, layout, rank, args, {})) for rank in range(layout.ranks)]
    torch.stack([loss(list(results)) for results in simulate.run(work, ranks)]).sum().backward()
    for rank, inputs in enumerate(ranks):
        for node, mine, full in zip(nodes, inputs, whole, strict=True):
            if full.grad is not None:
                wanted = _part(layout, work.sources[node], full.grad, rank)
                got = torch.zeros_like(mine) if mine.grad is None else mine.grad
                torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def _part(layout: WeightLayout, source: Source, full: Tensor, rank: int) -> Tensor:
    """What a rank holds of the value of a placeholder."""
    if source.segment is None:
        return full
    segment, box = layout.boxes(source.spec.name, rank)[max(source.order, 0)]
    alone = replace(segment, factors=segment.atoms, box=tuple((0, a) for dim in segment.atoms for a in dim))
    return alone.take(full, box)


def _undivided(work: Work, model: nn.Module) -> WeightLayout:
    return layout_of(replace(work, decisions=[]), tensors_of(model))


def _feed(
    work: Work, model: nn.Module, layout: WeightLayout, rank: int, args: Any, kwargs: dict[str, Any]
) -> list[Any]:
    """What the placeholders get on one rank, in their order."""
    leaves, _ = flatten_call(bind_call(model, args, kwargs))
    users = {spec.name: leaf for spec, leaf in zip(work.captured.user_inputs, leaves, strict=True)}
    tensors = tensors_of(model)
    found = []
    for node in work.graph.find_nodes(op="placeholder"):
        source, name = work.sources[node], work.sources[node].spec.name
        if source.spec.kind == "user":
            found.append(users[name])
        elif source.spec.kind == "constant":
            found.append(work.captured.constants[name])
        else:
            local = layout.shard(name, tensors[name].detach(), rank)
            found.append(layout.segments_of(name, local, rank)[max(source.order, 0)])
    return found

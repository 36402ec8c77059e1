"""Captured toy programs, planned and run: whole on one rank, or divided in lockstep on simulated ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests import simulate
from tpcompile.capture import bind_call, capture, flatten_call
from tpcompile.layout import WeightLayout
from tpcompile.pipeline import canonical, plan_program
from tpcompile.plan_layout import layout_of
from tpcompile.planner.cost import PRESETS, CostModel
from tpcompile.planner.decide import Pins
from tpcompile.work import Work


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
    return plan_program(canonicalised(model, *args, **options), cost, pins)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its name, tied ones under each of theirs."""
    params = dict(model.named_parameters(remove_duplicate=False))
    return params | dict(model.named_buffers(remove_duplicate=False))


def run_whole(work: Work, model: nn.Module, *args: Any, **kwargs: Any) -> list[Any]:
    """Runs the graph as it is, at global shapes, where markers are identities."""
    alone = replace(work, decisions=[], planned_factors=work.factors())
    inputs = _feed(alone, model, layout_of(alone, tensors_of(model)), 0, args, kwargs)
    return list(torch.fx.Interpreter(work.captured.graph_module, graph=work.graph).run(*inputs))


def run_ranks(work: Work, model: nn.Module, *args: Any, **kwargs: Any) -> list[list[Any]]:
    """Lowers a rewritten program for every rank and runs all in lockstep; the results by rank."""
    layout = layout_of(work, tensors_of(model))
    inputs = [_feed(work, model, layout, rank, args, kwargs) for rank in range(layout.ranks)]
    return [list(results) for results in simulate.run(work, inputs)]


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

"""Captured toy programs, planned and run: whole on one rank, or divided in lockstep on simulated ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests import simulate
from tpcompile.capture import bind_call, capture, flatten_call
from tpcompile.capture.program import Captured
from tpcompile.layout import WeightLayout
from tpcompile.pipeline import plan_program
from tpcompile.plan_layout import layout_of
from tpcompile.planner.cost import PRESETS, CostModel
from tpcompile.work import Work


def captured(model: nn.Module, *args: Any, dynamic: bool = False, **kwargs: Any) -> Captured:
    """The program of one call."""
    return capture(model, bind_call(model, args, kwargs), dynamic=dynamic)


def planned(
    model: nn.Module, *args: Any, ranks: int = 2, cost: CostModel = PRESETS["cpu"], **kwargs: Any
) -> Work:
    """The planned program of one call."""
    return plan_program(captured(model, *args, **kwargs), ranks, cost)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its name, tied ones under each of theirs."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )


def feeds(work: Work, model: nn.Module, layout: WeightLayout, rank: int, *args: Any, **kwargs: Any) -> list[Any]:
    """What the placeholders get on one rank, in their order."""
    leaves, _ = flatten_call(bind_call(model, args, kwargs))
    users = {spec.name: leaf for spec, leaf in zip(work.captured.user_inputs, leaves, strict=True)}
    tensors = tensors_of(model)
    found = []
    for node in work.graph.find_nodes(op="placeholder"):
        source = work.sources[node]
        name = source.spec.name
        if source.spec.kind == "user":
            found.append(users[name])
        elif source.spec.kind == "constant":
            found.append(work.captured.constants[name])
        else:
            local = layout.shard(name, tensors[name], rank)
            segments = layout.segments_of(name, local, rank)
            found.append(segments[max(source.order, 0)])
    return found


def run_whole(work: Work, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Runs the graph as it is, at global shapes; markers are identities there."""
    inputs = feeds(work, model, whole_layout_of(work, model), 0, *args, **kwargs)
    work.captured.graph_module.recompile()
    with torch.no_grad():
        return torch.fx.Interpreter(work.captured.graph_module).run(*inputs)  # type: ignore[no-any-return]


def run_ranks(work: Work, model: nn.Module, *args: Any, **kwargs: Any) -> list[tuple[Any, ...]]:
    """Lowers a rewritten program for every rank and runs them in lockstep; the results of each rank."""
    layout = layout_of(work, tensors_of(model))
    return simulate.run(
        work, [feeds(work, model, layout, rank, *args, **kwargs) for rank in range(layout.ranks)]
    )

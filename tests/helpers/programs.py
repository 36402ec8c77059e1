"""Captured toy programs, planned and run: whole on one rank, or divided in lockstep on simulated ranks."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tests.helpers import simulate
from tpcompile.capture.export.capture_model import capture
from tpcompile.ir.calls import bind_call, flatten_call
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.lowering.state import SOURCE
from tpcompile.pipeline import canonical, plan_program
from tpcompile.planner.decide import Pins
from tpcompile.planner.plan_layout import layout_of
from tpcompile.planner.search.cost import PRESETS, CostModel
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
    layout = _undivided(work, model)
    values = _values(work, model, layout, 0, args, kwargs)
    inputs = [_pick(work.sources[n], values, layout, 0) for n in work.graph.find_nodes(op="placeholder")]
    return list(torch.fx.Interpreter(work.captured.graph_module, graph=work.graph).run(*inputs))


def run_ranks(
    work: Work, model: nn.Module, *args: Any, lowered: list[GraphModule] | None = None, **kwargs: Any
) -> list[list[Any]]:
    """Lowers a rewritten program for every rank and runs all in lockstep; the results by rank."""
    layout, programs = layout_of(work, tensors_of(model)), lowered or simulate.lower_all(work)
    inputs = [
        _feed(program, _values(work, model, layout, rank, args, kwargs), layout, rank)
        for rank, program in enumerate(programs)
    ]
    return [list(results) for results in simulate.run(work, inputs, programs)]


def gradients_agree(work: Work, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Each rank's gradients are its parts of the undivided program's.

    The loss is a sum of all results, weighted at random, which every rank computes.
    """

    def loss(results: list[Any]) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        weighted = [(r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results]
        return torch.stack(weighted).sum()

    def leaves(layout: WeightLayout, rank: int) -> Values:
        found = _values(work, model, layout, rank, args, kwargs)
        return {
            (kind, name): v.clone().requires_grad_()
            if kind in ("param", "user") and isinstance(v, Tensor) and v.is_floating_point()
            else v
            for (kind, name), v in found.items()
        }

    alone = _undivided(work, model)
    whole = leaves(alone, 0)
    inputs = [_pick(work.sources[n], whole, alone, 0) for n in work.graph.find_nodes(op="placeholder")]
    loss(list(torch.fx.Interpreter(work.captured.graph_module, graph=work.graph).run(*inputs))).backward()
    layout, programs = layout_of(work, tensors_of(model)), simulate.lower_all(work)
    ranks = [leaves(layout, rank) for rank in range(layout.ranks)]
    given = [_feed(p, values, layout, r) for r, (p, values) in enumerate(zip(programs, ranks, strict=True))]
    torch.stack([loss(list(results)) for results in simulate.run(work, given, programs)]).sum().backward()
    for rank, values in enumerate(ranks):
        for (kind, name), full in whole.items():
            if isinstance(full, Tensor) and full.grad is not None:
                wanted = layout.shard(name, full.grad, rank) if kind in ("param", "buffer") else full.grad
                mine = values[kind, name]
                got = torch.zeros_like(mine) if mine.grad is None else mine.grad
                torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


Values = dict[tuple[str, str], Tensor]
"""What a rank has: arguments, constants, and its parts of parameters and buffers, by kind and name."""


def _undivided(work: Work, model: nn.Module) -> WeightLayout:
    alone = replace(work, decisions=[], planned_factors=work.planned_factors or work.factors())
    return layout_of(alone, tensors_of(model))


def _values(
    work: Work, model: nn.Module, layout: WeightLayout, rank: int, args: Any, kwargs: dict[str, Any]
) -> Values:
    leaves, _ = flatten_call(bind_call(model, args, kwargs))
    found = {("user", s.name): leaf for s, leaf in zip(work.captured.user_inputs, leaves, strict=True)}
    found |= {("constant", name): value for name, value in work.captured.constants.items()}
    tensors = tensors_of(model)
    for source in work.sources.values():
        kind, name = source.spec.kind, source.spec.name
        if kind == "attribute":
            found[kind, name] = attrgetter(name)(model)
        elif kind not in ("user", "constant"):
            found[kind, name] = layout.shard(name, tensors[name].detach(), rank)
    return found


def _feed(program: GraphModule, values: Values, layout: WeightLayout, rank: int) -> list[Any]:
    """What the placeholders of a rank's program get, in their order."""
    return [_pick(n.meta[SOURCE], values, layout, rank) for n in program.graph.find_nodes(op="placeholder")]


def _pick(source: Source, values: Values, layout: WeightLayout, rank: int) -> Any:
    value = values[source.spec.kind, source.spec.name]
    if source.order < 0:
        return value
    dim = layout.params[source.spec.name].packed_dim
    sizes = [s[dim] for s in layout.segment_shapes(source.spec.name, rank)]
    mine = sizes[source.order : source.order + source.count]
    return value.narrow(dim, sum(sizes[: source.order]), sum(mine))

"""Makes a program that a rank can run out of what was compiled for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from tpcompile.capture.caches.register import is_cache
from tpcompile.capture.export.captured import Captured
from tpcompile.capture.export.look_inside import without_values
from tpcompile.capture.export.specs import InputSpec
from tpcompile.capture.held_caches import Held, held_outputs
from tpcompile.compile_program import Compiled
from tpcompile.ir.calls import OpenNumber, flatten_call, identical
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.module_tensors import tensors_by_name
from tpcompile.lowering.local_shapes import LocalShapes
from tpcompile.lowering.state import SOURCE
from tpcompile.planner.global_program import GlobalProgram, Source

from .fetch_inputs import Feed
from .program import RankProgram, autocast_of, gradients_of, trained_weights
from .settings import Reads, Settings


def make_program(
    model: nn.Module,
    compiled: Compiled,
    bound: dict[str, Any],
    path: str,
    rank: int,
    settings: Settings,
    original: Callable[[str], type[nn.Module]],
) -> RankProgram:
    """The program of a rank.

    Args:
        model: the sharded model, with this rank's slices.
        compiled: what was compiled for the call.
        bound: the call.
        path: the submodule that is called, "" for the model itself.
        rank: this rank.
        settings: the model's.
        original: gives the original class of a module, by its path.
    """
    leaves = [int(x) if isinstance(x, OpenNumber) else x for x in flatten_call(bound)[0]]
    feeds, loose = make_feeds(model, compiled, compiled.lowered.local, rank), loose_leaves(bound)
    captured = local_extents(compiled, rank)
    outlined: tuple[GraphModule, tuple[Feed | int, ...]] | None = None
    if compiled.lowered.outlined is not None:
        outlined = compiled.lowered.outlined, make_feeds(model, compiled, compiled.lowered.outlined, rank)
    return RankProgram(
        compiled=compiled,
        captured=captured,
        graph_module=compiled.lowered.local,
        plan=compiled.plan,
        training=model.get_submodule(path).training,
        autocast=autocast_of(leaves),
        default=torch.get_default_dtype(),
        names=tuple(bound),
        example=without_values(leaves),
        feeds=feeds,
        mutated=_mutated(model, compiled),
        loose=loose,
        same=identical(leaves, loose),
        gradients=gradients_of(leaves, trained_weights(feeds)) if captured.asks_gradients else None,
        entry=path,
        numbers=open_leaves(leaves, captured),
        outlined=outlined,
        types=settings.types,
        state=settings.state,
        reads=Reads(model, compiled.planned.captured, original),
        root=model,
    )


def loose_leaves(bound: dict[str, Any]) -> tuple[int, ...]:
    """The places of a call's leaves that belong to no cache."""
    kinds = [is_cache(value) for value in bound.values() for _ in flatten_call({"": value})[0]]
    return tuple(at for at, held in enumerate(kinds) if not held)


def open_leaves(leaves: Sequence[Any], captured: Captured) -> frozenset[int]:
    """Which leaves are numbers that travel as sizes."""
    specs = enumerate(zip(leaves, captured.user_inputs, strict=True))
    return frozenset(
        i for i, (leaf, spec) in specs if spec.extents is not None and not isinstance(leaf, Tensor)
    )


def bind_program(
    program: RankProgram, model: nn.Module, rank: int, original: Callable[[str], type[nn.Module]]
) -> RankProgram:
    """The same program over the weights of another model, a copy of its own one.

    Args:
        program: a rank's program.
        model: the copy.
        rank: the rank.
        original: gives the original class of a module, by its path.
    """
    compiled, outlined = program.compiled, program.outlined
    if outlined is not None:
        outlined = outlined[0], make_feeds(model, compiled, outlined[0], rank)
    return replace(
        program,
        feeds=make_feeds(model, compiled, compiled.lowered.local, rank),
        mutated=_mutated(model, compiled),
        outlined=outlined,
        steps={},
        reads=Reads(model, compiled.planned.captured, original),
        root=model,
    )


def _mutated(model: nn.Module, compiled: Compiled) -> tuple[Feed, ...]:
    """Where the buffers are that a program changes."""
    places = tensors_by_name(model)
    return tuple(Feed(*places[name]) for name in _overwritten(compiled))


def _overwritten(compiled: Compiled) -> list[str]:
    outputs = compiled.planned.captured.outputs
    return [o.name for o in outputs if o.kind == "buffer_mutation"]


def make_feeds(model: nn.Module, compiled: Compiled, local: GraphModule, rank: int) -> tuple[Feed | int, ...]:
    """Where each placeholder of a rank's graph gets its value."""
    places = tensors_by_name(model)
    planned, layout = compiled.planned, compiled.plan.layout
    leaves = {spec.name: i for i, spec in enumerate(planned.captured.user_inputs)}
    overwritten = set(_overwritten(compiled))

    def feed(source: Source) -> Feed | int:
        name = source.spec.name
        if source.spec.kind == "user":
            return leaves[name]
        if source.spec.kind == "attribute":
            path, _, attribute = name.rpartition(".")
            return Feed(model.get_submodule(path), attribute)
        if source.spec.kind == "constant":
            return Feed(None, name, planned.captured.constants[name])
        if source.order < 0:
            return Feed(*places[name], overwritten=name in overwritten)
        if source.count == len(layout.segment_shapes(name, rank)):
            return Feed(*places[name])
        return Feed(*places[name], segment=layout.span(name, rank, source.order, source.count))

    return tuple(feed(node.meta[SOURCE]) for node in local.graph.find_nodes(op="placeholder"))


def hand_out(planned: GlobalProgram) -> dict[str, Held]:
    """How the caches that a program returns are placed."""
    placements = planned.handed_out()
    every = zip(planned.captured.whole_outputs, planned.whole_outputs(), strict=True)
    named = [(s.name, out) for s, out in every if isinstance(out, Node) and out in placements]
    return held_outputs(named, planned.planned_factors, placements)


def local_extents(compiled: Compiled, rank: int) -> Captured:
    """The captured program, with the sizes of given caches as a rank holds them."""
    planned = compiled.planned
    factors = planned.planned_factors
    shapes = LocalShapes(factors, planned.axis_sizes, WeightLayout(planned.axis_sizes, {}).coordinates(rank))
    local = {
        planned.sources[n].spec.name: shapes.shape(n, placements)
        for n, placements in planned.given(factors).items()
    }
    whole = whole_captured(planned)
    if planned.blocks is not None:
        local |= {leaf: local[twin] for (twin, _), leaf in planned.blocks.leaves.items() if twin in local}

    def adapt(spec: InputSpec) -> InputSpec:
        sizes = local.get(spec.name)
        if sizes is None or spec.extents is None:
            return spec
        extents = tuple(
            size if isinstance(size, int) else extent
            for size, extent in zip(sizes, spec.extents, strict=True)
        )
        return replace(spec, extents=extents)

    return replace(whole, inputs=tuple(map(adapt, whole.inputs)))


def whole_captured(planned: GlobalProgram) -> Captured:
    """The captured program with the inputs and outputs of the whole call, of all layers."""
    inputs = (
        *(spec for spec in planned.captured.inputs if spec.kind != "user"),
        *planned.captured.user_inputs,
    )
    return replace(planned.captured, inputs=inputs, outputs=planned.captured.whole_outputs, blocks=None)

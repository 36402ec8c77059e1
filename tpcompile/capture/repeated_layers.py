"""Captures a model without most of its repeated layers, in a time that does not grow with their number."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from tpcompile.capture.bind_call import flatten_call
from tpcompile.capture.capture_model import capture
from tpcompile.capture.dynamic_dims import Dims
from tpcompile.capture.fake_model import capture_device
from tpcompile.capture.find_repeats import Repeat, find_repeats, truncated
from tpcompile.capture.match_periods import BLOCK, match_periods, tag_nodes
from tpcompile.capture.program import Captured, InputSpec
from tpcompile.capture.switch_experts import exportable_experts
from tpcompile.capture.unroll_layers import Rename, RepeatedBlocks, unroll
from tpcompile.capture.verify_layers import refuse_layers

log = logging.getLogger(__name__)


@dataclass
class ShortCapture(Captured):
    """A program in which the last captured period of layers stands for all that follow.

    Attributes:
        blocks: which layers; None once they are unrolled.
    """

    blocks: RepeatedBlocks | None = None


def capture_repeated(
    model: nn.Module,
    bound: dict[str, Any],
    *,
    dynamic: bool | Mapping[str, Dims] = True,
    device: torch.device | str | None = None,
) -> Captured:
    """Capture ``model`` like ``capture``, but with three periods of each list of repeated layers.

    The result is a ``ShortCapture``; ``unroll_captured`` makes the whole program of it. Where the layers
    turn out not to repeat, or hand results to the outside one by one (caches, hidden states), all of them
    are captured, the result is an ordinary ``Captured``, and a note says why.
    """
    repeats = find_repeats(model)
    if not repeats:
        return capture(model, bound, dynamic=dynamic, device=device)
    short: Captured | None = None
    try:
        with truncated(model, repeats):
            short = capture(model, bound, dynamic=dynamic, device=device)
        tag_nodes(short.graph_module.graph, short.inputs, repeats)
        _share_constants(short)
        for number, repeat in enumerate(repeats):
            match_periods(short.graph_module.graph, number, repeat.kept - 1)
        refusal = _refuse(model, bound, repeats, device)
    except Exception as error:  # the model's own code, run with layers missing: it may fail in any way
        refusal = str(getattr(error, "what", None) or f"{type(error).__name__}: {error}").split("\n")[0]
        log.info("capture without repeated layers failed", exc_info=True)
    if refusal is None and short is not None:
        own = {f.name: getattr(short, f.name) for f in fields(Captured)}
        return ShortCapture(**own, blocks=RepeatedBlocks(tuple(repeats)))
    full = capture(model, bound, dynamic=dynamic, device=device)
    full.notes += (f"repeated layers were captured one by one: {refusal}",)
    return full


def _refuse(
    model: nn.Module, bound: dict[str, Any], repeats: list[Repeat], device: torch.device | str | None
) -> str | None:
    leaves, in_spec = flatten_call(bound)
    target = torch.device(device) if device is not None else capture_device(model, leaves)
    with exportable_experts(model, target), torch.inference_mode(False):
        return refuse_layers(model, repeats, leaves, in_spec, target)


def _share_constants(captured: Captured) -> None:
    """Leaves one of several equal constants: every layer that says ``torch.tensor(0.5)`` brings its own."""
    graph = captured.graph_module.graph
    first: list[tuple[torch.Tensor, Node]] = []
    kept: list[InputSpec] = []
    for node, spec in zip(graph.find_nodes(op="placeholder"), captured.inputs, strict=True):
        if spec.kind == "constant":
            value = captured.constants[spec.name]
            twin = next((n for other, n in first if _same(other, value)), None)
            if twin is not None:
                node.replace_all_uses_with(twin)
                graph.erase_node(node)
                del captured.constants[spec.name]
                continue
            first.append((value, node))
        kept.append(spec)
    if len(kept) < len(captured.inputs):
        captured.inputs = tuple(kept)
        captured.graph_module.recompile()


def _same(one: torch.Tensor, two: torch.Tensor) -> bool:
    alike = (one.shape, one.dtype, one.device) == (two.shape, two.dtype, two.device)
    return one is two or (alike and bool(torch.equal(one, two)))


def unroll_captured(captured: Captured) -> Captured:
    """Return the whole program; the graph is changed in place. An ordinary ``Captured`` comes back as is.

    The new weights stand where the model's own order has them.
    """
    if not isinstance(captured, ShortCapture) or captured.blocks is None:
        return captured
    graph = captured.graph_module.graph
    placeholders = graph.find_nodes(op="placeholder")
    specs: dict[Node, InputSpec] = dict(zip(placeholders, captured.inputs, strict=True))
    behind = _followers(list(specs.items()))

    def new_param(node: Node, rename: Rename) -> Node:
        spec = specs[node]
        name = rename(spec.name)
        with graph.inserting_before(behind[node.meta[BLOCK].repeat, spec.kind]):
            copy = graph.placeholder(node.name.replace(spec.name.replace(".", "_"), name.replace(".", "_")))
        copy.target = copy.name  # the argument's name in the generated code: it must be unique as well
        copy.meta = dict(node.meta)
        specs[copy] = replace(spec, name=name)
        return copy

    unroll(graph, captured.blocks, new_param)
    graph.lint()
    captured.graph_module.recompile()
    inputs = tuple(specs[node] for node in graph.find_nodes(op="placeholder"))
    return replace(captured, inputs=inputs, blocks=None)


def _followers(specs: list[tuple[Node, InputSpec]]) -> dict[tuple[int, str], Node]:
    """Return per repeat and kind of weight the node before which copies go: behind the last kept period."""
    found: dict[tuple[int, str], Node] = {}
    for node, spec in specs:
        if BLOCK in node.meta:
            found[node.meta[BLOCK].repeat, spec.kind] = node.next
    return found

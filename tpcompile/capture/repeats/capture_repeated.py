"""Captures a model without most of its repeated layers, in a time that does not grow with their number."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from tpcompile.capture.caches.register import register_cache_support
from tpcompile.capture.export.capture_model import capture
from tpcompile.capture.export.captured import Captured
from tpcompile.capture.export.dynamic_dims import Dims
from tpcompile.capture.export.fake_model import capture_device
from tpcompile.capture.export.specs import InputSpec, OutputSpec
from tpcompile.capture.export.switch_experts import exportable_experts
from tpcompile.ir.calls import flatten_call, leaf_names
from tpcompile.ir.graph_edit import drop_unused
from tpcompile.ir.torch_internals import FakeTensor

from .blocks import BLOCK, Block, Derived, Repeat, RepeatedBlocks, block_of
from .cut_run import NotRepeated
from .find_repeats import find_repeats, truncated
from .match_periods import match_periods, tag_nodes, tag_tail
from .unroll_layers import Rename, unroll
from .verify_layers import Evidence, compare_layers

log = logging.getLogger(__name__)


def capture_repeated(
    model: nn.Module,
    bound: dict[str, Any],
    *,
    dynamic: bool | Mapping[str, Dims] = True,
    device: torch.device | str | None = None,
) -> Captured:
    """Capture ``model`` like ``capture``, but with three periods of each list of repeated layers.

    The result says so in its ``blocks``; ``unroll_captured`` makes the whole program of it. A layer may have
    tensors of the call and of the result for itself (caches, hidden states). Where the layers turn out not
    to repeat, all of them are captured, and a note says why.
    """
    repeats = find_repeats(model)
    if not repeats:
        return capture(model, bound, dynamic=dynamic, device=device)
    try:
        with _untold():
            return _capture_short(model, bound, repeats, dynamic, device)
    except Exception as error:  # the model's own code, run with layers missing: it may fail in any way
        known = str(error) if isinstance(error, NotRepeated) else getattr(error, "what", None)
        refusal = str(known or f"{type(error).__name__}: {error}").split("\n")[0]
        log.info("capture without repeated layers failed", exc_info=True)
    full = capture(model, bound, dynamic=dynamic, device=device)
    full.notes += (f"repeated layers were captured one by one: {refusal}",)
    return full


@contextmanager
def _untold() -> Iterator[None]:
    """Keeps torch from reporting operators that fail: what fails here is captured otherwise."""
    told = logging.getLogger(FakeTensor.__module__)
    told.addFilter(_nothing)
    try:
        yield
    finally:
        told.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _capture_short(
    model: nn.Module,
    bound: dict[str, Any],
    repeats: list[Repeat],
    dynamic: bool | Mapping[str, Dims],
    device: torch.device | str | None,
) -> Captured:
    register_cache_support()  # it decides what the leaves are
    leaves, in_spec = flatten_call(bound)
    target = torch.device(device) if device is not None else capture_device(model, leaves)
    with exportable_experts(model, target), torch.inference_mode(False):
        evidence = compare_layers(model, repeats, leaves, in_spec, target)
    twins = {leaf: twin for leaf, (twin, _) in evidence.twins.items()}
    with truncated(model, repeats):
        captured = capture(model, bound, dynamic=dynamic, device=device, twins=twins)
    if any(not write.is_plain for write in captured.writes):
        raise NotRepeated(f"forward leaves a value in {captured.writes[0].name}")
    names = leaf_names(bound)
    owner, facts = evidence.leaves.owner, evidence.leaves.facts
    owned = {names[i]: Block(*place) for i, place in owner.items() if i in facts and i not in twins}
    graph = captured.graph_module.graph
    inside = tag_nodes(graph, captured.inputs, repeats, owned)
    captured.inputs = tuple(_of_all_layers(spec, repeats) for spec in captured.inputs)
    _share_constants(captured)
    _share_sizes(graph)
    outputs, results = _arrange_results(captured, repeats, evidence)
    outputs = _written_alike(outputs, {names[i]: names[twin] for i, (twin, _) in evidence.twins.items()})
    _refuse_loose(captured, inside)
    captured.graph_module.recompile()
    for number, repeat in enumerate(repeats):
        match_periods(graph, number, repeat.kept - 1)
    blocks = RepeatedBlocks(
        tuple(repeats),
        _user_leaves(captured, leaves, names, twins),
        outputs,
        results,
        frozenset(evidence.recipe.shared),
        {(names[twin], copies): names[leaf] for leaf, (twin, copies) in evidence.twins.items()},
    )
    run = evidence.whole
    assert run.out_spec is not None
    whole = replace(captured, out_spec=run.out_spec, states=run.states, blocks=blocks)
    return replace(whole, reads=frozenset(run.reads), outer=run.outer, writes=run.writes, baked=None)


def _refuse_loose(captured: Captured, inside: set[Node]) -> None:
    """Refuses what is computed beside layers, and what they write or check: it would come too seldom."""
    graph = captured.graph_module.graph
    spans: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node in inside and BLOCK in node.meta:
            spans.setdefault(node.meta[BLOCK].repeat, []).append(node)
    for first, *_, last in spans.values():
        node = first
        while node is not last:
            if BLOCK not in node.meta and isinstance(node.meta.get("val"), torch.Tensor):
                raise NotRepeated(f"something runs between layers ({node.target}) that none of them uses")
            node = node.next
    results: Any = graph.output_node().args[0]
    for spec, value in zip(captured.outputs, results, strict=True):
        if spec.kind == "buffer_mutation" and BLOCK in value.meta:
            raise NotRepeated(f"layers write into {spec.name}")
        if spec.kind == "check" and BLOCK in value.meta:
            raise NotRepeated("layers check values")


def _of_all_layers(spec: InputSpec, repeats: Sequence[Repeat]) -> InputSpec:
    """The spec of an input; a layer's attribute becomes a constant, as it stands for others' too."""
    in_layers = any(repeat.period_of(spec.name) is not None for repeat in repeats)
    return replace(spec, kind="constant") if spec.kind == "attribute" and in_layers else spec


def _user_leaves(
    captured: Captured, leaves: Sequence[Any], names: Sequence[str], twins: Mapping[int, int]
) -> tuple[InputSpec, ...]:
    """What a call of the whole program brings; the sizes of a leaf left out are those of its twin."""
    specs = {spec.name: spec for spec in captured.user_inputs}
    return tuple(replace(specs[names[twins.get(i, i)]], name=names[i]) for i in range(len(leaves)))


def _arrange_results(
    captured: Captured, repeats: Sequence[Repeat], evidence: Evidence
) -> tuple[tuple[OutputSpec, ...], tuple[Derived, ...]]:
    """Makes the graph's results those that the whole program's follow from.

    Returns:
        The whole program's results, and how each of them follows.
    """
    graph, recipe = captured.graph_module.graph, evidence.recipe
    output = graph.output_node()
    specs = [spec for spec in captured.outputs if spec.kind in ("user", "state")]
    short = evidence.short
    if tuple(spec.name for spec in specs) != short.names or captured.out_spec != short.out_spec:
        raise NotRepeated("the exported model returns something else than the model that ran")
    given: tuple[Any, ...] = output.args[0]  # type: ignore[assignment]
    for at, place in recipe.shared.items():
        if recipe.outputs[at] >= 0:
            tag_tail(given[recipe.outputs[at]], Block(*place))
    results, kept = [], []
    for at, n in enumerate(recipe.outputs):
        value = given[n if n >= 0 else ~n]
        if n < 0:
            repeat, period = recipe.shared[at]
            value = match_periods(graph, repeat, period).pairs[value]
        block = block_of(value) if isinstance(value, Node) and at not in recipe.shared else None
        if block is not None and block.period == repeats[block.repeat].kept - 2:
            raise NotRepeated(f"the result {specs[n].name} comes from one of the layers only")
        results.append(value)
        kept.append(specs[n if n >= 0 else ~n])
    run = evidence.whole
    triples = list(zip(recipe.results, run.names, run.values, strict=True))
    whole = [replace(kept[derived.output], name=name, value=value) for derived, name, value in triples]
    # A name is that of the first of the whole program's results that a captured one stands for.
    for derived, name, _ in sorted(triples, key=lambda triple: triple[0].copies, reverse=True):
        kept[derived.output] = replace(kept[derived.output], name=name)
    values = (*results, *given[len(specs) :])
    output.args = (values,)
    output.meta["val"] = tuple(v.meta.get("val") if isinstance(v, Node) else v for v in values)
    mutations = captured.outputs[len(specs) :]
    captured.outputs = (*kept, *mutations)
    drop_unused(graph)
    added = [Derived(at) for at in range(len(kept), len(captured.outputs))]
    return (*whole, *mutations), (*recipe.results, *added)


def _written_alike(outputs: Sequence[OutputSpec], twins: Mapping[str, str]) -> tuple[OutputSpec, ...]:
    """Results of which those that belong to a leaf left out are written in place as its twin's are.

    In the captured call the two are one tensor, which is written as the twin.
    """
    written = {spec.name for spec in outputs if spec.in_place}
    return tuple(replace(o, in_place=o.in_place or twins.get(o.name) in written) for o in outputs)


def _share_sizes(graph: Graph) -> None:
    """Reads a size that several inputs have from the first of them, not from one layer's own."""
    first: dict[Any, tuple[Node, int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        if isinstance(node.meta.get("val"), torch.Tensor):
            for dim, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt):
                    first.setdefault(size.node.expr, (node, dim))
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int):
        source, dim = node.args
        if isinstance(source, Node) and source.op == "placeholder" and BLOCK in source.meta:
            node.args = first[source.meta["val"].shape[dim].node.expr]
            node.meta.pop(BLOCK, None)


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
    """Return the whole program; the graph is changed in place. A whole one comes back as it is.

    The new weights stand where the model's own order has them.
    """
    if captured.blocks is None:
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
    users = {spec.name: node for node, spec in specs.items() if spec.kind == "user"}
    body = next(node for node in graph.nodes if node.op != "placeholder")
    for user in captured.blocks.users:
        body.prepend(users[user.name])
    graph.lint()
    captured.graph_module.recompile()
    inputs = tuple(specs[node] for node in graph.find_nodes(op="placeholder"))
    return replace(captured, inputs=inputs, outputs=captured.whole_outputs, blocks=None)


def _followers(specs: list[tuple[Node, InputSpec]]) -> dict[tuple[int, str], Node]:
    """Return per repeat and kind of weight the node before which copies go: behind the last kept period."""
    found: dict[tuple[int, str], Node] = {}
    for node, spec in specs:
        if BLOCK in node.meta:
            found[node.meta[BLOCK].repeat, spec.kind] = node.next
    return found

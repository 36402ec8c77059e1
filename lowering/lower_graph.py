"""Lowers a planned graph at global shapes to one rank's graph of local shapes and collectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tpcompile.capture.export.checkpoint_calls import ContextFn
from tpcompile.capture.export.kept_calls import FUNCTION
from tpcompile.capture.repeats.unroll_layers import unroll
from tpcompile.errors import TpCompileError
from tpcompile.ir.graph_edit import drop_unused
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.markers import MARKERS, MERGED
from tpcompile.ir.nodes import is_tensor, module_path
from tpcompile.ir.regions import join_regions
from tpcompile.ir.sizes import sizes_of
from tpcompile.planner.global_program import GlobalProgram, Source
from tpcompile.rules.opaque import is_opaque
from tpcompile.rules.rule import Rule

from . import localise
from .cannot_lower import cannot_lower, layers_differ
from .join_gradients import join_gradients
from .known_values import KnownValues
from .local_shapes import LocalShapes
from .lower_markers import lower_marker
from .lower_opaque import lower_opaque
from .lower_randomness import UNIFORM, lower_uniform, seed_graph
from .outline_layers import outline
from .owned_rows import begins_rows, lower_rows
from .recompute import for_training
from .state import SOURCE, STANDS_FOR, Groups, Lowering, lenient
from .update_in_place import update_in_place


@dataclass
class Lowered:
    """One rank's program, in up to three forms.

    Attributes:
        local: with all layers one after the other.
        outlined: with layers that repeat often as calls of a submodule, to be compiled.
        regions: what is saved of the regions that are computed again in backward, by their names.
        gathers_again: what is gathered for linear layers is gathered again in backward.
        in_place: it updates caches in place, and is the same for calls that record gradients.
        notes: which regions are not computed again, and why.
    """

    local: GraphModule
    outlined: GraphModule | None = None
    regions: Mapping[str, ContextFn | None] = field(default_factory=dict)
    gathers_again: bool = False
    in_place: bool = False
    notes: tuple[str, ...] = ()

    @cached_property
    def training(self) -> GraphModule | None:
        """The program for calls that record gradients; None if it is no other. Made when it is asked for."""
        return None if self.in_place else for_training(self.local.graph, self.regions, self.gathers_again)


def lower_program(
    program: GlobalProgram,
    coordinates: tuple[int, ...],
    groups: Groups,
    known: KnownValues | None = None,
) -> Lowered:
    """One rank's program: constants local, parameters as this rank's parts, real collectives.

    Args:
        program: a program whose reshards have become collectives.
        coordinates: the rank's position on each sub-axis.
        groups: its process groups.
        known: what is known from other ranks of the same program.

    Raises:
        CannotLower: an operator does not run on local shapes; it does where it is whole. Or layers that
            repeat are planned unlike each other.
        TpCompileError: an operator has other local shapes than its rule promised.
    """
    shapes = LocalShapes(program.planned_factors, program.axis_sizes, coordinates)
    local = _walk(Lowering(program, shapes, groups, known=known or KnownValues()))
    writes = any(spec.in_place for spec in program.captured.outputs)
    regions = {} if writes else program.captured.regions
    again = program.captured.gathers_again
    lowered = Lowered(local, regions=regions, gathers_again=again, in_place=writes)
    if program.blocks is not None:
        try:
            lists = unroll(local.graph, program.blocks, copy_placeholder)
        except TpCompileError as error:
            raise layers_differ(error) from error
        if not writes and _may_outline(program, local.graph):
            lowered.outlined = outline(local.graph, lists)
        drop_unused(local.graph)  # of the last layer, what only the others return
    join_gradients(local.graph)
    seed_graph(local.graph, groups, len(program.axis_sizes))
    if regions:
        lowered.notes = join_regions(local.graph)
    elif program.captured.regions:
        lowered.notes = ("nothing is recomputed in backward: the call updates caches in place",)
    local.recompile()
    update_in_place(local, program.captured.whole_outputs, _given(local.graph))
    return lowered


def _walk(low: Lowering) -> GraphModule:
    """Lowers all nodes in order and checks every local shape against its placement."""
    for node in low.program.graph.nodes:
        if node.op == "placeholder":
            low.local[node] = _placeholder(low, node)
        elif node.op == "output":
            low.graph.output(low.map(node.args[0]))
        else:
            try:
                low.local[node] = _call(low, node)
            except TpCompileError:
                raise
            except Exception as error:
                raise cannot_lower(node, error) from error
            _check(low, node)
            _keep_value(low, node)
    drop_unused(low.graph)
    _drop_joined(low)
    low.graph.lint()
    return GraphModule(torch.nn.Module(), low.graph, "LocalProgram")


def _placeholder(low: Lowering, node: Node) -> Node:
    new = low.graph.placeholder(node.name)
    new.meta.update(node.meta)
    new.meta[SOURCE] = low.program.sources[node]
    name = low.program.sources[node].spec.name
    custom = low.program.custom.parts.get(name)
    if custom is not None:
        shape = custom[WeightLayout(low.program.axis_sizes, {}).rank(low.shapes.coordinates)].shape
        new.meta["val"] = low.value_of(torch.Tensor.new_empty, node.meta["val"], shape)
    elif is_tensor(node) and any(str(p) != "R" for p in node.meta["placement"]):
        new.meta["val"] = low.part(node)
    if is_tensor(node) and "placement" in node.meta:
        new.meta[STANDS_FOR] = ((node.name, node.meta["placement"]),)
    return new


def _call(low: Lowering, node: Node) -> Any:
    if node.target in MARKERS or node.target in MERGED:
        return lower_marker(low, node)
    begun = next((s for s in node.meta.get("choices") or () if begins_rows(s)), None)
    if begun is not None:
        return lower_rows(low, node, begun)
    if is_opaque(node):
        return lower_opaque(low, node)
    if node.target is UNIFORM:
        return lower_uniform(low, node)
    rule = low.shapes.factors.rules.get(node)
    name = rule.localize if isinstance(rule, Rule) and low.divided(node) else ""
    if name:
        return localise.LOCALISERS[name](low, node)
    if node.target is torch.ops.aten.sym_size.int:
        return localise.sym_size(low, node)
    args, kwargs = low.map(node.args), low.map(node.kwargs)
    if node.target is FUNCTION:
        args = (*args[:2], low.program.captured.functions[args[2]].handle, *args[3:])
    if all(_is_whole(low, operand) for operand in node.all_input_nodes):
        return low.emit_as(lenient(node.target), args, node.meta["val"], like=node, **kwargs)
    return low.emit(node.target, *args, like=node, **kwargs)


def _check(low: Lowering, node: Node) -> None:
    if not is_tensor(node) or "placement" not in node.meta:
        return
    expected = low.shapes.shape(node, node.meta["placement"])
    got = list(sizes_of(low.local[node].meta["val"]))
    meta = low.local[node].meta
    meta["placement"] = node.meta["placement"]
    meta[STANDS_FOR] = (*meta.get(STANDS_FOR, ()), (node.name, node.meta["placement"]))
    if any(isinstance(e, int) and e != g for e, g in zip(expected, got, strict=True)):
        raise TpCompileError(
            f"{node.target} gives {got} on this rank where {expected} was planned",
            where=f"{node.name} in {module_path(node)}",
            todo="its sharding rule does not fit; correct it with tpcompile.register_rule",
        )


def _is_whole(low: Lowering, node: Node) -> bool:
    """Whether a value is here what it is at global shapes: what follows of such values is known."""
    local = low.local[node]
    return isinstance(local, Node) and local.meta["val"] is node.meta["val"]


def _keep_value(low: Lowering, node: Node) -> None:
    """Lets a local value that looks like the global one be that one."""
    local, whole = low.local[node], node.meta["val"]
    if isinstance(local, Node) and is_tensor(node) and _look_alike(local.meta["val"], whole):
        local.meta["val"] = whole


def _drop_joined(low: Lowering) -> None:
    """Removes placeholders of segments that are only used together."""
    for parts in low.joined:
        for node in (low.local[p] for p in parts):
            if not node.users:
                low.graph.erase_node(node)


def _look_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two values have the same type, sizes and strides, as expressions."""
    if one.dtype != other.dtype or one.ndim != other.ndim:
        return False
    pairs = zip((*one.shape, *one.stride()), (*other.shape, *other.stride()), strict=True)
    return all(_expression(a) == _expression(b) for a, b in pairs)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _may_outline(program: GlobalProgram, graph: Graph) -> bool:
    """Whether layers may become calls: not if they draw numbers, or run custom modules."""
    draws = bool(graph.find_nodes(op="call_function", target=UNIFORM))
    return not (draws or program.custom.parts)


def _given(graph: Graph) -> dict[str, Node]:
    """The placeholders of what a call brings, by name."""
    sources: dict[Node, Source] = {n: n.meta[SOURCE] for n in graph.find_nodes(op="placeholder")}
    return {source.spec.name: node for node, source in sources.items() if source.spec.kind == "user"}


def copy_placeholder(template: Node, rename: Callable[[str], str]) -> Node:
    """The placeholder of another layer's parameter."""
    graph = template.graph
    source: Source = template.meta[SOURCE]
    with graph.inserting_before(template):
        new = graph.placeholder(f"{template.name}_copy")
        new.target = new.name  # the graph made the name its own, the target becomes the argument's name
    new.meta.update(template.meta)
    spec = replace(source.spec, name=rename(source.spec.name))
    new.meta[SOURCE] = replace(source, spec=spec)
    return new

"""Lowers a planned graph at global shapes to one rank's graph of local shapes and collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.fx import Graph, GraphModule, Node

from tpcompile.capture.repeats.capture_repeated import whole_outputs
from tpcompile.capture.repeats.unroll_layers import unroll
from tpcompile.errors import TpCompileError
from tpcompile.ir.graph_edit import KEPT_META, drop_unused, fake_mode, module_path, value_of
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.markers import MARKERS, MERGED, Axes
from tpcompile.rules.opaque import is_opaque
from tpcompile.rules.rule import Rule, sizes_of
from tpcompile.work import Source, Work, is_tensor

from . import localise
from .local_shapes import LocalShapes
from .lower_markers import lower_marker
from .lower_positions import new_size
from .lower_randomness import UNIFORM, lower_uniform, seed_graph
from .opaque_module import LocalModule, lower_opaque
from .outline_layers import outline
from .owned_rows import begins_rows, lower_choice
from .update_in_place import update_in_place

SOURCE = "source"
"""The key of a local placeholder's meta data that says where its value comes from."""


class Groups(Protocol):
    """Process groups over sub-axes, as seen by one rank."""

    def name(self, axes: Axes) -> str:
        """The group's name."""

    def index(self, axes: Axes) -> int:
        """This rank's position in it."""


@dataclass
class Lowering:
    """The state of lowering one rank's graph.

    Attributes:
        work: the planned program.
        shapes: local sizes on this rank.
        groups: this rank's process groups.
        graph: the local graph being built.
        local: per node of the global graph, its local counterpart.
        joined: the placeholders of segments that are used together.
        local_modules: the modules of custom strategies, by key.
        parts: the local sizes of dynamic dimensions that are divided, by whole size and ranks.
    """

    work: Work
    shapes: LocalShapes
    groups: Groups
    graph: Graph = field(default_factory=Graph)
    local: dict[Node, Any] = field(default_factory=dict)
    joined: dict[tuple[Node, ...], Node] = field(default_factory=dict)
    local_modules: dict[str, LocalModule] = field(default_factory=dict)
    parts: dict[tuple[Any, int], torch.SymInt] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mode = fake_mode(self.work.graph)

    def emit(self, target: Any, *args: Any, like: Node, **kwargs: Any) -> Node:
        """Adds a call to the local graph; its value is computed on fake tensors."""
        target = _lenient(target)
        try:
            val = value_of(target, args, kwargs, self.mode)
        except (RuntimeError, IndexError, ValueError) as error:
            raise TpCompileError(
                f"{target} does not run on local shapes: {error}",
                where=f"{like.name} in {module_path(like)}",
                todo="report this; a pin to replicate the parameters of that module avoids it",
            ) from error
        return self.emit_as(target, args, val, like=like, **kwargs)

    def emit_as(self, target: Any, args: tuple[Any, ...], val: Any, *, like: Node, **kwargs: Any) -> Node:
        """Adds a call whose value is known."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update({k: like.meta[k] for k in KEPT_META if k in like.meta})
        node.meta["val"] = val
        return node

    def run(self) -> GraphModule:
        """Lowers all nodes in order and checks every local shape against its placement."""
        for node in self.work.graph.nodes:
            if node.op == "placeholder":
                self.local[node] = self._placeholder(node)
            elif node.op == "output":
                self.graph.output(self.map(node.args[0]))
            else:
                self.local[node] = self._call(node)
                self._check(node)
                self._keep_value(node)
        drop_unused(self.graph)
        self._drop_joined()
        self.graph.lint()
        return GraphModule(torch.nn.Module(), self.graph, "LocalProgram")

    def map(self, arg: Any) -> Any:
        """Arguments of the global graph as arguments of the local one."""
        return torch.fx.node.map_arg(arg, lambda n: self.local[n])

    def part_of(self, size: torch.SymInt, ranks: int) -> torch.SymInt:
        """How many of a dynamic number of positions each of some ranks has."""
        key = (size.node.expr, ranks)
        if key not in self.parts:
            self.parts[key] = new_size(self.mode, len(self.parts))
        return self.parts[key]

    def divided(self, node: Node) -> list[tuple[int, Any]]:
        """The axes on which a call is divided, each with the factor."""
        strategies = node.meta.get("strategies") or ()
        return [(a, s.factor) for a, s in enumerate(strategies) if s is not None and s.factor is not None]

    def _placeholder(self, node: Node) -> Node:
        new = self.graph.placeholder(node.name)
        new.meta.update(node.meta)
        new.meta[SOURCE] = self.work.sources[node]
        name = self.work.sources[node].spec.name
        custom = self.work.custom.parts.get(name)
        if custom is not None:
            shape = custom[WeightLayout(self.work.axes, {}).rank(self.shapes.coordinates)].shape
            new.meta["val"] = value_of(torch.Tensor.new_empty, (node.meta["val"], shape), {}, self.mode)
        elif is_tensor(node) and any(str(p) != "R" for p in node.meta["placement"]):
            new.meta["val"] = self.part(node)
        return new

    def join(self, parts: Sequence[Node], dim: int) -> Node:
        """A placeholder for segments of one parameter, given in their order: locally they are one tensor."""
        key = tuple(parts)
        if key not in self.joined:
            first, last = self.local[parts[0]], self.local[parts[-1]]
            with self.graph.inserting_after(last):
                node = self.graph.placeholder(f"{first.name}_to_{last.name}")
            vals = [self.local[p].meta["val"] for p in parts]
            node.meta.update({k: first.meta[k] for k in KEPT_META if k in first.meta})
            node.meta["val"] = value_of(torch.cat, (vals, dim), {}, self.mode)
            node.meta[SOURCE] = replace(self.work.sources[parts[0]], segment=None, count=len(parts))
            self.joined[key] = node
        return self.joined[key]

    def _drop_joined(self) -> None:
        """Removes placeholders of segments that are only used together."""
        for parts in self.joined:
            for node in (self.local[p] for p in parts):
                if not node.users:
                    self.graph.erase_node(node)

    def part(self, node: Node) -> torch.Tensor:
        """A fake tensor of the local size; dynamic dimensions are whole."""
        val: torch.Tensor = node.meta["val"]
        for dim, size in enumerate(self.shapes.shape(node, node.meta["placement"])):
            if isinstance(size, int):
                val = value_of(torch.narrow, (val, dim, 0, size), {}, self.mode)
        whole: torch.Tensor = value_of(torch.Tensor.contiguous, (val,), {}, self.mode)
        return whole

    def _call(self, node: Node) -> Any:
        if node.target in MARKERS or node.target in MERGED:
            return lower_marker(self, node)
        begun = next((s for s in node.meta.get("strategies") or () if begins_rows(s)), None)
        if begun is not None:
            return lower_choice(self, node, begun)
        if is_opaque(node):
            return lower_opaque(self, node)
        if node.target is UNIFORM:
            return lower_uniform(self, node)
        rule = self.shapes.factors.rules.get(node)
        name = rule.localize if isinstance(rule, Rule) and self.divided(node) else ""
        if name:
            return localise.LOCALISERS[name](self, node)
        if node.target is torch.ops.aten.sym_size.int:
            return localise.sym_size(self, node)
        args, kwargs = self.map(node.args), self.map(node.kwargs)
        if all(self._is_whole(operand) for operand in node.all_input_nodes):
            return self.emit_as(_lenient(node.target), args, node.meta["val"], like=node, **kwargs)
        return self.emit(node.target, *args, like=node, **kwargs)

    def _is_whole(self, node: Node) -> bool:
        """Whether a value is here what it is at global shapes: what follows of such values is known."""
        local = self.local[node]
        return isinstance(local, Node) and local.meta["val"] is node.meta["val"]

    def _keep_value(self, node: Node) -> None:
        """Lets a local value that looks like the global one be that one."""
        local, whole = self.local[node], node.meta["val"]
        if isinstance(local, Node) and is_tensor(node) and _look_alike(local.meta["val"], whole):
            local.meta["val"] = whole

    def _check(self, node: Node) -> None:
        if not is_tensor(node) or "placement" not in node.meta:
            return
        expected = self.shapes.shape(node, node.meta["placement"])
        got = list(sizes_of(self.local[node].meta["val"]))
        self.local[node].meta["placement"] = node.meta["placement"]
        if any(isinstance(e, int) and e != g for e, g in zip(expected, got, strict=True)):
            raise TpCompileError(
                f"{node.target} gives {got} on this rank where {expected} was planned",
                where=f"{node.name} in {module_path(node)}",
                todo="its sharding rule does not fit; correct it with tpcompile.register_rule",
            )


def _lenient(target: Any) -> Any:
    """A view becomes a reshape.

    What runs may leave other strides than what was captured: collectives do, and an attention whose mask
    wants a gradient.
    """
    return torch.ops.aten.reshape.default if target is torch.ops.aten.view.default else target


def _look_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two values have the same type, sizes and strides, as expressions."""
    if one.dtype != other.dtype or one.ndim != other.ndim:
        return False
    pairs = zip((*one.shape, *one.stride()), (*other.shape, *other.stride()), strict=True)
    return all(_expression(a) == _expression(b) for a, b in pairs)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def lower_graph(work: Work, coordinates: tuple[int, ...], groups: Groups) -> GraphModule:
    """One rank's program, see ``lower_program``, with all layers one after the other."""
    return lower_program(work, coordinates, groups)[0]


def lower_program(
    work: Work, coordinates: tuple[int, ...], groups: Groups
) -> tuple[GraphModule, GraphModule | None]:
    """One rank's program: constants local, parameters as this rank's parts, real collectives.

    It comes twice: with all layers one after the other, and, if many layers repeat, with these as calls of
    a submodule, to be compiled.

    Args:
        work: a program whose reshards have become collectives.
        coordinates: the rank's position on each sub-axis.
        groups: its process groups.

    Raises:
        TpCompileError: an operator does not run on the local shapes that its rule promised.
    """
    assert work.planned_factors is not None, "the program must be planned"
    shapes = LocalShapes(work.planned_factors, work.axes, coordinates)
    local = Lowering(work, shapes, groups).run()
    outlined = None
    if work.blocks is not None:
        lists = unroll(local.graph, work.blocks, _copy_placeholder)
        if _may_outline(work, local.graph):
            outlined = outline(local.graph, lists)
        drop_unused(local.graph)  # of the last layer, what only the others return
    seed_graph(local.graph, groups, len(work.axes))
    local.recompile()
    update_in_place(local, whole_outputs(work.captured), _given(local.graph))
    return local, outlined


def _may_outline(work: Work, graph: Graph) -> bool:
    """Whether layers may become calls: not if they write, draw numbers, or run custom modules."""
    writes = any(spec.in_place for spec in work.captured.outputs)
    draws = bool(graph.find_nodes(op="call_function", target=UNIFORM))
    return not (writes or draws or work.custom.parts)


def _given(graph: Graph) -> dict[str, Node]:
    """The placeholders of what a call brings, by name."""
    sources: dict[Node, Source] = {n: n.meta[SOURCE] for n in graph.find_nodes(op="placeholder")}
    return {source.spec.name: node for node, source in sources.items() if source.spec.kind == "user"}


def _copy_placeholder(template: Node, rename: Callable[[str], str]) -> Node:
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

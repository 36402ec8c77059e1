"""Lowers a planned graph at global shapes to one rank's graph of local shapes and collectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.fx import Graph, GraphModule, Node

from tpcompile.capture.unroll_layers import unroll
from tpcompile.errors import TpCompileError
from tpcompile.graph_edit import KEPT_META, drop_unused, fake_mode, module_path, value_of
from tpcompile.markers import MARKERS, Axes
from tpcompile.rules.rule import Rule, sizes_of
from tpcompile.work import Source, Work, is_tensor

from . import localise
from .local_shapes import LocalShapes
from .lower_markers import lower_marker
from .outline_layers import outline

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
    """

    work: Work
    shapes: LocalShapes
    groups: Groups
    graph: Graph = field(default_factory=Graph)
    local: dict[Node, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.mode = fake_mode(self.work.graph)

    def emit(self, target: Any, *args: Any, like: Node, **kwargs: Any) -> Node:
        """Adds a call to the local graph; its value is computed on fake tensors."""
        try:
            val = value_of(target, args, kwargs, self.mode)
        except (RuntimeError, IndexError, ValueError) as error:
            if target is torch.ops.aten.view.default:
                # A collective may leave other strides than the operator that it stands behind.
                return self.emit(torch.ops.aten.reshape.default, *args, like=like, **kwargs)
            raise TpCompileError(
                f"{target} does not run on local shapes: {error}",
                where=f"{like.name} in {module_path(like)}",
                todo="report this; a pin to replicate the parameters of that module avoids it",
            ) from error
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
        drop_unused(self.graph)
        self.graph.lint()
        return GraphModule(torch.nn.Module(), self.graph, "LocalProgram")

    def map(self, arg: Any) -> Any:
        """Arguments of the global graph as arguments of the local one."""
        return torch.fx.node.map_arg(arg, lambda n: self.local[n])

    def divided(self, node: Node) -> list[tuple[int, Any]]:
        """The axes on which a call is divided, each with the factor."""
        strategies = node.meta.get("strategies") or ()
        return [(a, s.factor) for a, s in enumerate(strategies) if s is not None and s.factor is not None]

    def _placeholder(self, node: Node) -> Node:
        new = self.graph.placeholder(node.name)
        new.meta.update(node.meta)
        new.meta[SOURCE] = self.work.sources[node]
        if is_tensor(node) and any(str(p) != "R" for p in node.meta["placement"]):
            new.meta["val"] = self._part(node)
        return new

    def _part(self, node: Node) -> torch.Tensor:
        """A fake tensor of the local size; dynamic dimensions are whole."""
        val: torch.Tensor = node.meta["val"]
        for dim, size in enumerate(self.shapes.shape(node, node.meta["placement"])):
            if isinstance(size, int):
                val = value_of(torch.narrow, (val, dim, 0, size), {}, self.mode)
        whole: torch.Tensor = value_of(torch.Tensor.contiguous, (val,), {}, self.mode)
        return whole

    def _call(self, node: Node) -> Any:
        if node.target in MARKERS:
            return lower_marker(self, node)
        rule = self.shapes.factors.rules.get(node)
        name = rule.localize if isinstance(rule, Rule) and self.divided(node) else ""
        if name:
            return localise.LOCALISERS[name](self, node)
        if node.target is torch.ops.aten.sym_size.int:
            return localise.sym_size(self, node)
        return self.emit(node.target, *self.map(node.args), like=node, **self.map(node.kwargs))

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
        outlined = outline(local.graph, lists)
        drop_unused(local.graph)  # of the last layer, what only the others return
        local.recompile()
    return local, outlined


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

"""The state of lowering one rank's graph. Every rewrite emits its calls on local values through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic

from tpcompile.ir.graph_edit import KEPT_META, fake_mode
from tpcompile.ir.markers import Axes
from tpcompile.ir.torch_internals import FakeTensorMode
from tpcompile.planner.global_program import GlobalProgram

from .known_values import KnownValues
from .local_module import LocalModule
from .local_shapes import LocalShapes

aten = torch.ops.aten

SOURCE = "source"
"""The key of a local placeholder's meta data that says where its value comes from."""


STANDS_FOR = "stands_for"
"""The key of a local value's meta data with the global values that it is a rank's part of, and as what."""

_EXAMPLE = 23


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
        program: the planned program.
        shapes: local sizes on this rank.
        groups: this rank's process groups.
        graph: the local graph being built.
        local: per node of the global graph, its local counterpart.
        joined: the placeholders of segments that are used together.
        local_modules: the modules of custom strategies, by key.
        known: what calls give, as far as another rank has made them.
    """

    program: GlobalProgram
    shapes: LocalShapes
    groups: Groups
    graph: Graph = field(default_factory=Graph)
    local: dict[Node, Any] = field(default_factory=dict)
    joined: dict[tuple[Node, ...], Node] = field(default_factory=dict)
    local_modules: dict[str, LocalModule] = field(default_factory=dict)
    known: KnownValues = field(default_factory=KnownValues)

    def __post_init__(self) -> None:
        self.mode = fake_mode(self.program.graph)
        self.known.next_rank()

    def emit(self, target: Any, *args: Any, like: Node, **kwargs: Any) -> Node:
        """Adds a call to the local graph; its value is computed on fake tensors."""
        target = lenient(target)
        return self.emit_as(target, args, self.value_of(target, *args, **kwargs), like=like, **kwargs)

    def value_of(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """What a call gives on fake tensors."""
        return self.known.value_of(target, args, kwargs, self.mode)

    def emit_as(self, target: Any, args: tuple[Any, ...], val: Any, *, like: Node, **kwargs: Any) -> Node:
        """Adds a call whose value is known."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update({k: like.meta[k] for k in KEPT_META if k in like.meta})
        node.meta["val"] = val
        return node

    def within(self, x: Node, first: Any, end: Any, *, like: Node) -> Node:
        """Which elements are at least ``first``, and below ``end``."""
        above = self.emit(aten.ge.Scalar, x, first, like=like)
        below = self.emit(aten.lt.Scalar, x, end, like=like)
        return self.emit(aten.logical_and.default, above, below, like=like)

    def map(self, arg: Any) -> Any:
        """Arguments of the global graph as arguments of the local one."""
        return torch.fx.node.map_arg(arg, lambda n: self.local[n])

    def part_of(self, size: torch.SymInt, ranks: int) -> torch.SymInt:
        """How many of a dynamic number of positions each of some ranks has."""
        key = (size.node.expr, ranks)
        parts = self.known.parts
        if key not in parts:
            parts[key] = _new_size(self.mode, len(parts))
        return parts[key]

    def divided(self, node: Node) -> list[tuple[int, Any]]:
        """The axes on which a call is divided, each with the factor."""
        choices = node.meta.get("choices") or ()
        return [(a, s.factor) for a, s in enumerate(choices) if s is not None and s.factor is not None]

    def join(self, parts: Sequence[Node], dim: int) -> Node:
        """A placeholder for segments of one parameter, given in their order: locally they are one tensor."""
        key = tuple(parts)
        if key not in self.joined:
            first, last = self.local[parts[0]], self.local[parts[-1]]
            with self.graph.inserting_after(last):
                node = self.graph.placeholder(f"{first.name}_to_{last.name}")
            vals = [self.local[p].meta["val"] for p in parts]
            node.meta.update({k: first.meta[k] for k in KEPT_META if k in first.meta})
            node.meta["val"] = self.value_of(torch.cat, vals, dim)
            node.meta[SOURCE] = replace(self.program.sources[parts[0]], segment=None, count=len(parts))
            self.joined[key] = node
        return self.joined[key]

    def part(self, node: Node) -> torch.Tensor:
        """A fake tensor of the local size; dynamic dimensions are whole."""
        val: torch.Tensor = node.meta["val"]
        for dim, size in enumerate(self.shapes.shape(node, node.meta["placement"])):
            if isinstance(size, int):
                val = self.value_of(torch.narrow, val, dim, 0, size)
        whole: torch.Tensor = self.value_of(torch.Tensor.contiguous, val)
        return whole


def lenient(target: Any) -> Any:
    """A view becomes a reshape.

    What runs may leave other strides than what was captured: collectives do, and an attention whose mask
    wants a gradient.
    """
    return torch.ops.aten.reshape.default if target is torch.ops.aten.view.default else target


def _new_size(mode: FakeTensorMode, number: int) -> torch.SymInt:
    """A size of its own, of which nothing is known but that it is neither 0 nor 1."""
    from tpcompile.ir.dynamo_internals import ConstantSource

    env = mode.shape_env
    assert env is not None, "sizes are symbolic"
    source = ConstantSource(f"positions_{number}")
    symbol = env.create_symbol(_EXAMPLE, source, DimDynamic.DYNAMIC)
    size = env.create_symintnode(symbol, hint=_EXAMPLE, source=source)
    assert isinstance(size, torch.SymInt)
    return size

"""The layers of a rewritten program by kinds: of those in a list that look alike one is drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.fx import Node

from tpcompile.ir.names import starred
from tpcompile.ir.nodes import module_path
from tpcompile.planner.global_program import GlobalProgram

from .timeline import layer_of

_SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)


@dataclass
class LayerKind:
    """Layers of a list that compute alike.

    Attributes:
        name: the last of them that was captured; "" for a program without layers.
        nodes: its calls.
        numbers: of all layers of the kind in the list, those included that capture has left out.
    """

    name: str
    nodes: list[Node]
    numbers: tuple[int, ...] = ()


def kinds_of(program: GlobalProgram) -> list[LayerKind]:
    """The kinds of layers of a rewritten program, list by list; or all of a program without layers."""
    weights = program.params()
    layers: dict[str, list[Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and (layer := layer_of(weights.get(node) or module_path(node))):
            layers.setdefault(layer, []).append(node)
    if not layers:
        return [LayerKind("", [n for n in program.graph.nodes if n.op == "call_function"])]
    behind = {node for nodes in layers.values() for node in nodes}
    for node in program.graph.nodes:
        if not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
    likeness = _Likeness(program, behind)
    found: dict[str, list[LayerKind]] = {}
    for name, nodes in layers.items():
        kinds = found.setdefault(starred(name), [])
        numbers = _stands_for(program, name)
        same = next((kind for kind in kinds if likeness.of_layers(kind.nodes, nodes)), None)
        if same is None:
            kinds.append(LayerKind(name, nodes, numbers))
        else:
            same.name, same.nodes, same.numbers = name, nodes, (*same.numbers, *numbers)
    return [kind for kinds in found.values() for kind in kinds]


def _stands_for(program: GlobalProgram, layer: str) -> tuple[int, ...]:
    """The number of a captured layer, and of those that were left out for it."""
    number = int(layer.rpartition(".")[2])
    for repeat in program.blocks.repeats if program.blocks is not None else ():
        if repeat.layer_of(layer) == number and repeat.period_of(layer) == repeat.kept - 1:
            return (number, *(n for n in repeat.dropped if (n - number) % repeat.period == 0))
    return (number,)


@dataclass
class _Likeness:
    """Which calls of a program look alike, as it is drawn: constants and sizes are not compared.

    Attributes:
        program: the program.
        behind: what layers compute, and what depends on it.
    """

    program: GlobalProgram
    behind: set[Node]
    _known: dict[tuple[Node, Node], bool] = field(default_factory=dict)

    def of_layers(self, one: list[Node], other: list[Node]) -> bool:
        """Whether two layers do the same, one call after the other, with what comes from the same places."""
        ours, theirs = (list(filter(_is_drawn, nodes)) for nodes in (one, other))
        places = [{node: at for at, node in enumerate(nodes)} for nodes in (ours, theirs)]

        def same(x: Node, y: Node) -> bool:
            inside = places[0].get(x), places[1].get(y)
            return inside[0] == inside[1] and (inside[0] is not None or self._given(x, y))

        return len(ours) == len(theirs) and all(
            self._look(a) == self._look(b) and _pairwise(same, a, b)
            for a, b in zip(ours, theirs, strict=True)
        )

    def _look(self, node: Node) -> tuple[object, ...]:
        source = self.program.sources.get(node)
        name = module_path(node) if source is None else source.spec.name
        return (node.op, "" if source else str(node.target), starred(name), node.meta.get("placement"))

    def _given(self, x: Node, y: Node) -> bool:
        """Whether values from outside of two layers are alike; what other layers give is like anything."""
        if x is y or x in self.behind or y in self.behind:
            return True
        if (x, y) not in self._known:
            self._known[x, y] = self._look(x) == self._look(y) and _pairwise(self._given, x, y)
        return self._known[x, y]


def _pairwise(same: Callable[[Node, Node], bool], a: Node, b: Node) -> bool:
    """Whether what two calls read is the same, one value after the other."""
    read = [list(filter(_is_drawn, node.all_input_nodes)) for node in (a, b)]
    return len(read[0]) == len(read[1]) and all(map(same, *read))


def _is_drawn(node: Node) -> bool:
    """Whether a value is not a size, which a layer may take from another."""
    return not isinstance(node.meta.get("val"), _SIZES)

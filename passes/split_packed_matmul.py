"""SplitPackedMatmul: a packed projection becomes one projection per segment."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from tpcompile.ir.graph_edit import KEPT_META, call, drop_unused, with_operands
from tpcompile.ir.layout.segment import Segment, whole_segment
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.names import starred
from tpcompile.ir.nodes import argument, module_path, operands, producer, results, shape
from tpcompile.planner.global_program import GlobalProgram, Pass, Source
from tpcompile.rules.factors import Factors
from tpcompile.rules.rule import Rule

aten = torch.ops.aten


@dataclass(frozen=True)
class Part:
    """A range of one factor of one dimension: ``sizes`` are the dimension's factors, major first."""

    dim: int
    sizes: tuple[int, ...]
    factor: int
    start: int
    stop: int

    @property
    def kept(self) -> int:
        """The size of the dimension that is left."""
        return math.prod(self.sizes) // self.sizes[self.factor] * (self.stop - self.start)


@dataclass(frozen=True)
class SplitPackedMatmul(Pass):
    """Replaces slices of ``op(x, W)`` by ``op(x, slice of W)``, the slices as parameters of their own.

    Fires where slices cut a dimension that comes, through operators whose rules let it pass, from
    parameters only; together they must cover it. It is what lets ``[q k v]`` with unequal segments be
    divided by heads. Only the groups named are split (the planner tries which ones pay); a group is a
    module path with ``*`` for numbers. Parameters that a layout holds already are only cut as it holds them.
    """

    name = "split-packed-matmul"
    groups: frozenset[str] = frozenset()
    layout: WeightLayout | None = None

    def apply(self, program: GlobalProgram) -> bool:
        changed = False
        for value, cuts in packed_values(program):
            splitter = _Splitter(program)
            if group_of(value) in self.groups and splitter.cuts_as(self.layout, value, cuts):
                splitter.split(value, cuts)
                changed = True
        if drop_unused(program.graph) or changed:
            _drop_split_params(program)
        program.split_groups |= self.groups
        return changed


def _drop_split_params(program: GlobalProgram) -> None:
    """Removes the placeholders of parameters that now exist as segments."""
    split = {
        s.spec.name for s in program.sources.values() if s.spec.name in program.packed_dims and s.order >= 0
    }
    for node, source in list(program.sources.items()):
        if source.spec.name in split and source.order < 0 and not node.users:
            del program.sources[node]
            program.graph.erase_node(node)


def group_of(node: Node) -> str:
    """The module that a node belongs to, numbers replaced by ``*``."""
    return starred(module_path(node))


def packed_values(program: GlobalProgram) -> list[tuple[Node, list[Node]]]:
    """Values whose every use is a slice of one dimension that leads back to parameters."""
    return list(_packed(_Splitter(program)))


def _packed(splitter: _Splitter) -> Iterator[tuple[Node, list[Node]]]:
    for value in splitter.graph.nodes:
        if value.op == "call_function" and (cuts := _cuts(value)) and splitter.reaches_params(value, cuts[0]):
            yield value, cuts


def packed_groups(program: GlobalProgram, among: Container[str] | None = None) -> list[str]:
    """The groups of packed values, in the graph's order; those with parameters among some only, if given."""
    splitter, names = _Splitter(program), dict[str, set[str]]()
    for value, cuts in _packed(splitter):
        names.setdefault(group_of(value), set()).update(splitter.params(value, cuts[0]))
    return [group for group, used in names.items() if among is None or all(n in among for n in used)]


def _cuts(value: Node) -> list[Node] | None:
    """The slices that take a value apart, if all its uses are such and they cover it."""
    users = list(value.users)
    if len(users) < 2 or any(u.target is not aten.slice.Tensor for u in users):
        return None
    parts = [_part(u) for u in users]
    if any(p is None for p in parts):
        return None
    ranges = sorted((p.start, p.stop) for p in parts if p is not None)
    dims = {p.dim for p in parts if p is not None}
    ends = [0, *(stop for _, stop in ranges)]
    size = shape(value)[dims.pop()]
    return users if not dims and ends == [start for start, _ in ranges] + [size] else None


def _part(node: Node) -> Part | None:
    """What a slice keeps, in numbers; None if that is not static or has a step."""
    source: Node = argument(node, 0, "self")
    dim = argument(node, 1, "dim", 0) % len(shape(source))
    start, stop = argument(node, 2, "start") or 0, argument(node, 3, "end")
    step, size = argument(node, 4, "step", 1), shape(source)[dim]
    if (
        not isinstance(size, int)
        or step != 1
        or not isinstance(start, int)
        or not isinstance(stop, int | None)
    ):
        return None
    start, stop, _ = slice(start, stop).indices(size)
    return Part(dim, (size,), 0, start, stop)


def _in_order(cuts: list[Node]) -> list[tuple[Node, Part]]:
    """The slices with what they keep, one behind the other."""
    return sorted(((cut, part) for cut in cuts if (part := _part(cut))), key=lambda found: found[1].start)


class _Splitter:
    """Moves a part from a value up to the parameters that it comes from."""

    def __init__(self, program: GlobalProgram) -> None:
        self.program, self.graph = program, program.graph
        self.factors: Factors = program.factors()
        self.memo: dict[tuple[Node, Part], Node] = {}

    def reaches_params(self, value: Node, cut: Node) -> bool:
        """Whether the part can be moved all the way, and its major factors do not fill the ranks."""
        part = _part(cut)
        leaves = list(self._leaves(value, part)) if part else []
        return bool(leaves) and all(
            leaf is not None and math.prod(leaf[1].sizes[: leaf[1].factor]) < self.program.ranks
            for leaf in leaves
        )

    def params(self, value: Node, cut: Node) -> set[str]:
        """The parameters that a value is a packed product of."""
        part = _part(cut)
        return {leaf[0] for leaf in self._leaves(value, part) if leaf} if part else set()

    def cuts_as(self, layout: WeightLayout | None, value: Node, cuts: list[Node]) -> bool:
        """Whether the slices take parameters apart as a layout does; one that it leaves open it takes so."""
        for order, (_, part) in enumerate(_in_order(cuts)):
            for name, inner in filter(None, self._leaves(value, part)):
                if layout is None or name in layout.undecided:
                    continue
                segments = layout.params[name].segments
                mine = _cut_segment(whole_segment(layout.params[name].shape, 0), inner)
                held = segments[order] if len(segments) == len(cuts) else None
                if held is None or (held.factors, held.box) != (mine.factors, mine.box):
                    return False
        return True

    def split(self, value: Node, cuts: list[Node]) -> None:
        """Replaces each slice by the value computed from the matching slices of parameters."""
        for order, (cut, part) in enumerate(_in_order(cuts)):
            with self.graph.inserting_before(cut):
                new = self._compute(value, part, order)
            cut.replace_all_uses_with(new)
        self.factors = self.program.factors()

    def _leaves(self, value: Node, part: Part) -> Iterator[tuple[str, Part] | None]:
        """The part at every parameter it leads to, by name; None where it meets something else."""
        source = self.program.sources.get(value)
        if source is not None:
            whole = source.segment is not None and len(source.segment.factors[part.dim]) == 1
            yield (source.spec.name, part) if whole and len(value.users) == 1 else None
            return
        inputs = self._inputs(value, part)
        if inputs is None:
            yield None
            return
        for operand, inner in inputs:
            if inner is not None:
                yield from self._leaves(operand, inner)

    def _inputs(self, value: Node, part: Part) -> list[tuple[Node, Part | None]] | None:
        """The operands of a value's operator, each with what the part means there (None: nothing)."""
        rule = self.factors.rules.get(value)
        if value.op != "call_function" or not isinstance(rule, Rule) or len(results(value)) != 1:
            return None
        if producer(value)[0] is not value or rule.localize not in ("", "sizes"):
            return None
        letters = rule.outputs[0][part.dim]
        moved: list[tuple[Node, Part | None]] = []
        for operand, labels in zip(operands(value), rule.inputs, strict=True):
            found = _translate(part, letters, labels, rule)
            if found == "no":
                return None
            moved.append((operand, found))  # type: ignore[arg-type]
        if not any(p for _, p in moved) or (set(letters) & rule.whole):
            return None
        return moved

    def _compute(self, value: Node, part: Part, order: int) -> Node:
        key = (value, part)
        if key not in self.memo:
            if value in self.program.sources:
                self.memo[key] = self._cut_param(value, part, order)
            else:
                self.memo[key] = self._recompute(value, part, order)
        return self.memo[key]

    def _recompute(self, value: Node, part: Part, order: int) -> Node:
        inputs = self._inputs(value, part)
        assert inputs is not None
        args, kwargs = with_operands(value, [self._compute(o, p, order) if p else o for o, p in inputs])
        rule = self.factors.rules[value]
        assert isinstance(rule, Rule)
        if rule.localize == "sizes":
            sizes = list(args[1])
            sizes[part.dim] = part.kept
            args = (args[0], sizes)
        return call(self.graph, value.target, args, kwargs, like=value)  # type: ignore[arg-type]

    def _cut_param(self, param: Node, part: Part, order: int) -> Node:
        """A placeholder for a slice of a parameter."""
        source = self.program.sources[param]
        assert source.segment is not None
        segment = _cut_segment(source.segment, part)
        self.program.packed_dims[source.spec.name] = part.dim
        return segment_placeholder(self.program, param, segment, order)


def segment_placeholder(program: GlobalProgram, param: Node, segment: Segment, order: int) -> Node:
    """A placeholder for one of the segments of a parameter."""
    first = next(n for n in program.graph.nodes if n.op == "call_function")
    with program.graph.inserting_before(first):
        node = program.graph.placeholder(f"{param.name}_part{order}")
    node.meta.update({k: param.meta[k] for k in KEPT_META if k in param.meta})
    full = param.meta["val"]
    with full.fake_mode:
        node.meta["val"] = torch.empty(segment.shape, dtype=full.dtype, device=full.device)
    program.sources[node] = Source(program.sources[param].spec, segment, order)
    return node


def _cut_segment(segment: Segment, part: Part) -> Segment:
    at = sum(len(d) for d in segment.factors[: part.dim])
    ranges = [(0, s) for s in part.sizes]
    ranges[part.factor] = (part.start, part.stop)
    factors = segment.factors[: part.dim] + (part.sizes,) + segment.factors[part.dim + 1 :]
    box = segment.box[:at] + tuple(ranges) + segment.box[at + 1 :]
    cut = replace(segment, factors=factors, box=box)
    return replace(cut, atoms=tuple((s,) for s in cut.shape))


def _translate(part: Part, letters: tuple[str, ...], labels: Any, rule: Rule) -> Part | str | None:
    """What a part of an output dimension is in an operand: a part, nothing (None), or ``"no"``."""
    dims = [d for d, names in enumerate(labels) if set(names) & set(letters)]
    if not dims:
        return None
    if len(dims) > 1:
        return "no"
    names = labels[dims[0]]
    sizes = tuple(rule.sizes[n] for n in names)
    if not all(isinstance(s, int) for s in sizes):
        return "no"
    if names == letters:
        return replace(part, dim=dims[0])
    if len(letters) == 1 and len(part.sizes) == 1:  # one factor of a compound dimension
        return Part(dims[0], sizes, names.index(letters[0]), part.start, part.stop)
    return "no"

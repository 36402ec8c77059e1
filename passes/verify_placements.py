"""Proves the placements of a rewritten graph, forward and backward, from the operators' rules alone.

Every value has a type on every sub-axis. Those of the inputs are given; a call's follow from its operands' by
its rule, a collective's by what it does. Nothing that the planner decided or a pass noted is believed: where
a node carries a placement, it is compared with the one that was derived. The idea is that of JAX's varying
types and of spmd_types (meta-pytorch); ``docs/proof.md`` says what corresponds to what.
"""

from __future__ import annotations

import operator
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from tpcompile.errors import TpCompileError
from tpcompile.ir import markers
from tpcompile.ir.nodes import is_tensor, module_path, operands, producer, results, shape, source_line
from tpcompile.ir.placements import Filled, Owned, Partial, Placement, R, Shard
from tpcompile.ir.proof import Proof
from tpcompile.planner.global_program import GlobalProgram, alike
from tpcompile.planner.options import rules_version
from tpcompile.rules.choices import Choice, choices
from tpcompile.rules.factors import Factors, Known, Place
from tpcompile.rules.rule import Letters, Rule
from tpcompile.rules.table import rule_of

from .placement_types import MOVES, NONE, SUMMAND, WHOLE, Move, Type, Types, Unproved, filled, refuse_disorder
from .unmerge import unmerged


def verify_placements(program: GlobalProgram, *, training: bool, after: str = "") -> Proof:
    """Derives the type of every value and refuses what does not follow.

    Args:
        program: a rewritten program: planned, with collectives.
        training: gradients are recorded, so that they must come out whole, and once.
        after: the pass that ran last, for the error.

    Raises:
        TpCompileError: a value cannot be placed as the graph says. It names the node, the module, the source
            line and the rule, and says what was expected and what was found.
    """
    began = time.perf_counter()
    checker = _Checker(program, training, after)
    values, moves, rules, unruled = checker.check(), Counter[str](), Counter[str](), set[str]()
    for node in checker.graph.nodes:
        rule = checker.factors.rules.get(node)
        if node.target in markers.MARKERS:
            moves[getattr(node.target, "__name__", str(node.target))] += 1
        elif isinstance(rule, Rule):
            rules[str(node.target).removesuffix(".default")] += 1
        elif rule is not None:
            unruled.add(str(node.target).removesuffix(".default"))
    seconds = time.perf_counter() - began
    return Proof(
        values, program.axis_sizes, moves, rules, tuple(sorted(unruled)), training, rules_version(), seconds
    )


class _Checker:
    def __init__(self, program: GlobalProgram, training: bool, after: str) -> None:
        self.after = f"after {after}" if after else ""
        self.program, self.training, self.axes = program, training, range(len(program.axis_sizes))
        self.graph, self.copies = unmerged(program)
        planned = program.planned_factors
        inputs = program.graph.find_nodes(op="placeholder")
        known = {
            self.copies[n]: Known(planned.atom_sizes(n), _divided(program, n)) for n in inputs if is_tensor(n)
        }
        self.factors = Factors(self.graph, known, lambda n: program.refused.get(alike(n)) or _rule_of(n))
        self.given = {self.copies[n]: placements for n, placements in program.given(planned).items()}
        self.sources = {self.copies[n]: source for n, source in program.sources.items()}
        # The layout of the weights follows from this, whatever is noted on the nodes.
        self.stored = {self.copies[n]: tuple(d.output(n) for d in program.decisions) for n in inputs}
        self.types: dict[tuple[Node, int], Types] = {}

    def check(self) -> int:
        """Derives every type in the order of the graph."""
        for node in self.graph.nodes:
            try:
                if node.op == "output":
                    self._results()
                    continue
                for i, types in enumerate(self._derive(node)):
                    self.types[node, i] = types
                if is_tensor(node):
                    self._compare(node)
            except Unproved as error:
                raise self._refusal(node, str(error)) from None
        return len(self.types)

    def type_of(self, value: Node) -> Types:
        """The type of a value that has been derived."""
        return self.types[producer(value)]

    # Deriving.

    def _derive(self, node: Node) -> list[Types]:
        if node.op == "placeholder":
            return [self._input(node)] if is_tensor(node) else []
        if node.target is operator.getitem or not results(node):
            return []
        if node.target in markers.MARKERS:
            return [self._moved(node)]
        by_axis = [self._computed(node, axis) for axis in self.axes]
        return [tuple(types[i] for types in by_axis) for i in range(len(results(node)))]

    def _input(self, node: Node) -> Types:
        source = self.sources[node]
        learns = self.training and source.spec.kind in ("param", "user") and _is_real(node)
        gradient = WHOLE if learns else NONE
        if source.spec.kind in ("param", "buffer"):
            placements = self.stored[node]
        else:
            placements = self.given.get(node, (R,) * len(self.axes))
        return tuple(Type(p, gradient) for p in placements)

    def _computed(self, node: Node, axis: int) -> list[Type]:
        """The types of a call's results on one sub-axis."""
        given = [self.type_of(o)[axis] for o in operands(node)]
        chosen = self._choice(node, axis, [t.placement for t in given])
        rule = self.factors.rules.get(node)
        divided = chosen.factor is not None or any(isinstance(p, Partial | Owned) for p in chosen.outputs)
        for i, each in enumerate(given):
            if each.placement != R or each.gradient == NONE:
                continue
            summand = divided
            if isinstance(rule, Rule) and rule.declared is not None:
                summand = i in rule.declared.summed
            if summand and each.gradient == WHOLE:
                raise Unproved(
                    f"operand {operands(node)[i].name} is whole, and so is its gradient, but the ranks "
                    "compute different parts with it: copy_to_ranks must stand before it"
                )
            if divided and not summand and each.gradient == SUMMAND:
                raise Unproved(f"operand {operands(node)[i].name} has a gradient that nobody sums up")
        return [Type(p, self._gradient(node, i, given, divided)) for i, p in enumerate(chosen.outputs)]

    def _gradient(self, node: Node, result: int, given: Sequence[Type], divided: bool) -> str:
        """What a rank has of the gradient of a result."""
        rule = self.factors.rules.get(node)
        ends = node.target is torch.ops.aten.detach.default or not _is_real(results(node)[result])
        kinds = {t.gradient for t in given} - {NONE}
        if ends or not kinds or (isinstance(rule, Rule) and result in rule.fixed):
            return NONE
        if divided or (isinstance(rule, Rule) and rule.declared is not None):  # which says what is summed
            return WHOLE
        if len(kinds) > 1:
            raise Unproved("some operands have a whole gradient, some a summand of it on every rank")
        return kinds.pop()

    def _choice(self, node: Node, axis: int, given: Sequence[Placement]) -> Choice:
        """The way to compute a call that its rule has for operands that are placed like this."""
        wanted = tuple(Shard(p.dim) if isinstance(p, Filled) else p for p in given)
        claimed = (node.meta.get("placement") or {axis: None})[axis]
        fitting = [s for s in self._choices(node, axis) if s.inputs == wanted]
        if any(map(_is_filled, given)):
            fitting = [filled(s) for s in fitting if not any(isinstance(p, Partial) for p in s.outputs)]
        if not fitting:
            ways = [str(s) for s in self._choices(node, axis)]
            raise Unproved(
                f"its rule computes nothing from ({', '.join(map(str, given))}) on sub-axis {axis}; it has "
                f"{'; '.join(ways)}"
            )
        chosen = next((s for s in fitting if claimed in s.outputs), fitting[0])
        if not any(map(_is_filled, given)):
            self._refuse_other_way(node, axis, chosen, fitting)
        return chosen

    def _refuse_other_way(self, node: Node, axis: int, chosen: Choice, fitting: Sequence[Choice]) -> None:
        """Lowering goes the way that is noted: a mean of summands is another call than a mean over parts."""
        rule, noted = self.factors.rules.get(node), (node.meta.get("choices") or {axis: None})[axis]
        rows = noted is not None and any(isinstance(p, Owned) for p in noted.outputs)
        if rows or (isinstance(rule, Rule) and rule.localize):
            if _divides(noted) not in map(_divides, fitting):
                raise Unproved(
                    f"on sub-axis {axis} it is given what is {chosen}, and is to be computed as {noted}"
                )

    def _choices(self, node: Node, axis: int) -> list[Choice]:
        return choices(node, self.factors, lambda _: True, self.program.axis_sizes[: axis + 1])

    # Moving.

    def _moved(self, node: Node) -> Types:
        """The type behind a marker."""
        value, *options = node.args
        assert isinstance(value, Node)
        types = list(self.type_of(value))
        if node.target is markers.keep_whole:
            return tuple(types)
        if node.target not in MOVES:
            raise Unproved("it is left, although it stands for a choice that passes make")
        if node.kwargs or not options:
            raise Unproved("its sub-axes and options must be given, all of them by position")
        axes: markers.Axes = options[0]  # type: ignore[assignment]
        move = MOVES[node.target](*options[1:])
        if node.target is markers.copy_to_ranks:
            move = self._disowning(node, axes, move)
        refuse_disorder(axes, [t.placement for t in types], move)
        for axis in axes:
            now = types[axis]
            if now.placement != move.src:
                raise Unproved(f"it takes {move.src} on sub-axis {axis}, and is given {now}")
            if move.takes and now.gradient not in (move.takes, NONE):
                raise Unproved(f"it wants the {move.takes} gradient on sub-axis {axis}, and is given {now}")
            types[axis] = Type(move.dst, NONE if now.gradient == NONE else move.leaves)
        return tuple(types)

    def _disowning(self, node: Node, axes: markers.Axes, move: Move) -> Move:
        """Whole rows may become their owners' alone: nothing is lost, so that it is enough to say so."""
        claimed = {node.meta["placement"][axis] for axis in axes} if "placement" in node.meta else {R}
        place = claimed.pop()
        return replace(move, dst=place) if not claimed and isinstance(place, Owned) else move

    # Comparing.

    def _compare(self, node: Node) -> None:
        claimed, found = node.meta.get("placement"), self.type_of(node)
        if claimed is not None and tuple(claimed) != tuple(t.placement for t in found):
            raise Unproved(f"it is said to be {_text(claimed)}, and is {_text(found)}")

    def _results(self) -> None:
        """Results are whole, with a whole gradient, but for caches, which stay as they were handed out."""
        handed = {self.copies[n]: p for n, p in self.program.handed_out().items()}
        for out, spec in zip(self.graph.output_node().args[0], self.program.captured.outputs, strict=True):  # type: ignore[arg-type]
            if not isinstance(out, Node) or not is_tensor(out):
                continue
            wanted = handed.get(out, (R,) * len(self.axes)) if spec.divided else (R,) * len(self.axes)
            found, name = self.type_of(out), spec.name or out.name
            if tuple(t.placement for t in found) != tuple(wanted):
                raise Unproved(f"the result {name} must be {_text(wanted)}, and is {_text(found)}")
            if any(t.placement == R and t.gradient == SUMMAND for t in found):
                raise Unproved(f"the result {name} takes a summand of a gradient that is whole")

    def _refusal(self, node: Node, why: str) -> TpCompileError:
        rule = self.factors.rules.get(node)
        name = f"{node.name} ({getattr(node.target, '__name__', node.target)})"
        at = [
            name,
            module_path(node),
            source_line(node),
            f"rule {rule}" if isinstance(rule, Rule) else "",
            self.after,
        ]
        return TpCompileError(
            f"the placements of this program cannot be proved: {why}",
            where=", ".join(part for part in at if part),
            todo="correct the pass or the rule that made it so; if it is none of yours, report this program",
        )


def _divided(program: GlobalProgram, node: Node) -> list[tuple[Place | None, int]]:
    """What is divided of an input, by how many ranks."""
    stored = [(decision.output(node), decision.ranks) for decision in program.decisions]
    return [((p.dim, p.factor) if isinstance(p, Shard) else None, ranks) for p, ranks in stored]


def _rule_of(node: Node) -> Rule | str:
    """The rule of a call; a marker leaves every dimension what it is."""
    if node.target not in markers.MARKERS or node.target is markers.keep_whole:
        return rule_of(node)
    letters = Letters()
    labels = [letters.dims(shape(o)) for o in operands(node)]
    if len(shape(node)) != len(labels[0]):
        raise TpCompileError(
            f"the placements of this program cannot be proved: {node.name} has {len(shape(node))} dimensions "
            f"and its operand {len(labels[0])}",
            where=module_path(node) or node.name,
            todo="correct the pass that made it so: a change of placement keeps global shapes",
        )
    return Rule(tuple(labels), (labels[0],), letters.sizes)


def _is_filled(place: Placement) -> bool:
    return isinstance(place, Filled)


def _divides(choice: Choice | None) -> object:
    """Where the factor that is divided stands, if one is."""
    factor = choice.factor if choice is not None else None
    return (factor.inputs, factor.outputs) if factor is not None else None


def _is_real(value: Any) -> bool:
    tensor = value.meta["val"] if isinstance(value, Node) else value
    return tensor.dtype.is_floating_point or tensor.dtype.is_complex


def _text(types: Sequence[object]) -> str:
    return " x ".join(map(str, types)) or "R"

"""Where two ways of running a call part: the first value that differs, in the order of the computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from tpcompile.ir.markers import origin
from tpcompile.ir.nodes import is_tensor, module_path, operands, source_line
from tpcompile.ir.placements import Filled, P, Partial, Placement, R
from tpcompile.ir.print_graph import node_text
from tpcompile.lowering.state import STANDS_FOR
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.rules.rule import Rule

from .assemble import RanksDiffer, Unknown, put_together, sizes_at
from .compare import difference, largest
from .locate_capture import locate_capture
from .outcome import Key
from .report import Difference, Kind
from .trial import Trial, whole_program
from .values import Name, Trace


def locate(trial: Trial, want: Mapping[Key, Any]) -> tuple[Kind, Difference | None]:
    """What is to blame for a difference, and where it begins.

    Args:
        trial: a call that ranks compute wrong.
        want: what the model leaves behind as python.
    """
    captured = GlobalProgram(trial.captured(), 1)
    captured_values = Trace(trial.learning)
    whole = trial.whole(captured, captured_values)
    if any(not f.error <= trial.limit for f in trial.compare(want, whole)):
        return "capture", locate_capture(trial, captured_values)
    rewritten = Trace(trial.learning)
    trial.whole(trial.rewritten, rewritten)
    ranks = Trace(trial.learning)
    trial.on_ranks(ranks)
    return "rewrite", _Search(trial, captured, captured_values, rewritten, ranks).first()


@dataclass
class _Search:
    trial: Trial
    captured: GlobalProgram
    before: Trace
    whole: Trace
    ranks: Trace

    def first(self) -> Difference | None:
        """The first value that differs: by a pass, or else between the whole and the ranks."""
        for backward in (False, True) if self.trial.learning else (False,):
            for find in (self._by_passes, self._by_ranks):
                if (found := find(backward)) is not None:
                    return found
        return None

    def _by_passes(self, backward: bool) -> Difference | None:
        """The first value of the rewritten graph that another one of that name was captured for."""

        def error(name: Name, want: Tensor, scale: float) -> tuple[float, str]:
            got = self.whole.values.get(name)
            mine = None if got is None else _value(got[0][0], backward)
            if mine is None or mine.shape != want.shape or mine.dtype != want.dtype:
                return 0.0, ""
            return difference(mine, want, scale), "a pass made it so, before any rank's program"

        return self._first(self.captured, self.before, backward, error)

    def _by_ranks(self, backward: bool) -> Difference | None:
        nodes = {node.name: node for node in self.trial.rewritten.graph.nodes}

        def error(name: Name, want: Tensor, scale: float) -> tuple[float, str]:
            held = self.ranks.values.get(name, {})
            if len(held) < self.trial.layout.ranks:
                return 0.0, ""
            parts = [_value(held[rank][0], backward) for rank in sorted(held)]
            placements = held[0][1]
            try:
                return self._apart(nodes[name[0]], want, parts, placements, backward, scale)
            except (Unknown, KeyError):
                return 0.0, ""

        return self._first(self.trial.rewritten, self.whole, backward, error)

    def _apart(
        self,
        node: Node,
        want: Tensor,
        parts: Sequence[Tensor],
        placements: Sequence[Placement],
        backward: bool,
        scale: float,
    ) -> tuple[float, str]:
        """How far what the ranks have is from the whole value."""
        factors = self.trial.rewritten.planned_factors
        sizes = sizes_at(want, factors.atom_sizes(origin(node)))
        least, why = math.inf, ""
        for reading in _readings(placements) if backward else [tuple(placements)]:
            try:
                got = put_together(parts, sizes, self.trial.layout.axis_sizes, reading, self.trial.limit)
            except RanksDiffer as error:
                why = str(error)
                continue
            for dim in {p.dim for p in reading if isinstance(p, Filled)}:
                got = got.narrow(dim, 0, want.shape[dim])
            least = min(least, difference(got, want, scale))
            why = why or _why_not_infinite(node, got, want)
        return least, why if least == math.inf else ""

    def _first(
        self,
        program: GlobalProgram,
        trace: Trace,
        backward: bool,
        error: Callable[[Name, Tensor, float], tuple[float, str]],
    ) -> Difference | None:
        """The first of a graph's values, in the order of computation, with an error over the limit."""
        local = whole_program(program)
        found = {(names[0][0], n.meta.get("block")): n for n in local.graph.nodes if (names := _names(n))}
        order = [(name, node) for name, node in found.items() if name in trace.values]
        gradients = [trace.values[name][0][0].grad for name, _ in order] if backward else []
        scale, agreed = 1e-2 * largest(gradients), set[Node]()
        for name, node in reversed(order) if backward else order:
            want = _value(trace.values[name][0][0], backward)
            apart, why = error(name, want, scale)
            if not apart <= self.trial.limit:
                return self._difference(program, name, node, apart, backward, agreed, why)
            agreed.add(node)
        return None

    def _difference(
        self,
        program: GlobalProgram,
        name: Name,
        node: Node,
        error: float,
        backward: bool,
        agreed: set[Node],
        why: str,
    ) -> Difference:
        global_node = next(n for n in program.graph.nodes if n.name == name[0])
        rule = self.trial.rewritten.planned_factors.rules.get(global_node)
        source = program.sources.get(global_node)
        beside = list(node.users) if backward else operands(node)
        return Difference(
            node=name[0] if source is None else source.spec.name,
            text=node_text(global_node),
            placement=" x ".join(map(str, global_node.meta.get("placement", ()))),
            rule=str(rule) if isinstance(rule, Rule) else "",
            module=module_path(node),
            line=source_line(node),
            error=error,
            backward=backward,
            agreed=tuple(dict.fromkeys(_placed(n) for n in beside if n in agreed)),
            why=why,
        )


def _why_not_infinite(node: Node, got: Tensor, want: Tensor) -> str:
    """Whether a call's way is right for finite numbers only, and some are not: see docs/proof.md."""
    choices = [c for c in node.meta.get("choices") or () if c is not None]
    summed = any(p == P for c in choices for p in c.inputs) and len(operands(node)) > 1
    if not summed or not bool((got.isnan() & want.isinf()).any()):
        return ""
    return "infinite as a whole, but ranks have summands, of which infinity or 1 / 0 makes both of its signs"


def _names(node: Node) -> Any:
    return node.meta.get(STANDS_FOR, ()) if is_tensor(node) else ()


def _placed(node: Node) -> str:
    placements = " x ".join(map(str, node.meta.get("placement", ())))
    return f"{node.name} {placements}".strip()


def _value(value: Tensor, backward: bool) -> Tensor:
    if not backward:
        return value.detach()
    return torch.zeros_like(value) if value.grad is None else value.grad


def _readings(placements: Sequence[Placement]) -> Iterator[tuple[Placement, ...]]:
    """The ways in which ranks may have the gradient of a value: where it is whole, all of it or summands."""
    if not placements:
        yield ()
        return
    first, *rest = placements
    own: list[Placement] = [R] if isinstance(first, Partial) else [R, P] if first == R else [first]
    for others in _readings(rest):
        yield from ((one, *others) for one in own)

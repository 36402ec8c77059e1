"""Says why a parameter is placed as it is: what the alternatives would have cost, what rules refused."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass

from torch.fx import Node

from tpcompile.errors import TpCompileError
from tpcompile.ir.placements import Placement, R, Shard
from tpcompile.ir.print_graph import target_text
from tpcompile.ir.units import time_text
from tpcompile.planner.search.axis_problem import AxisProblem, solve_axis
from tpcompile.planner.search.cost import CostModel
from tpcompile.planner.search.facts import Facts
from tpcompile.rules.assignment import Assignment
from tpcompile.rules.factors import Factors
from tpcompile.rules.rule import Rule

from .decide import Pins
from .global_program import GlobalProgram

_PENALTY = 1.0
"""Seconds: what costs as much is held to a penalty, which is not time; no modelled step differs by that."""


@dataclass(frozen=True)
class Decision:
    """What was chosen for a parameter on one sub-axis.

    Attributes:
        where: the sub-axis as text, or "" if there is only one.
        chosen: the placement.
        others: the alternatives, each with what it would cost more or why it is refused.
    """

    where: str
    chosen: Placement
    others: tuple[tuple[Placement, str], ...]


@dataclass(frozen=True)
class Explanation:
    """Why a parameter, or a segment of it, is held as it is.

    Attributes:
        name: the parameter.
        factors: its shape, dimensions as products of the factors that were found.
        uses: the calls that use it, with their rules.
        decisions: per sub-axis.
    """

    name: str
    factors: str
    uses: tuple[str, ...]
    decisions: tuple[Decision, ...]

    def __str__(self) -> str:
        lines = [f"{self.name} {self.factors}", *(f"  used by {use}" for use in self.uses)]
        for decision in self.decisions:
            lines.append(f"  chosen{decision.where}: {decision.chosen}")
            lines += [f"    {option}: {price}" for option, price in decision.others]
        return "\n".join(lines)


def explain_module(program: GlobalProgram, cost: CostModel, pins: Pins, name: str) -> str:
    """The explanation of ``Plan.explain``.

    Args:
        program: the planned program, before it was rewritten.
        cost: the cost model it was planned with.
        pins: what parameters were held to; alternatives respect those of the others.
        name: a module or parameter.

    Raises:
        TpCompileError: no parameter of the program belongs to that name.
    """
    # Of layers that repeat only some were planned: the others are explained by the one that they copy.
    names = list(dict.fromkeys(program.params().values()))
    copies = [] if program.blocks is None else program.blocks.left_out(names)
    like = {p: p for p in names} | {copy: kept for kept, copy in copies}
    wanted = {kept for p, kept in like.items() if p == name or p.startswith(name + ".")}
    if not wanted:
        raise TpCompileError(
            f"{name!r} has no parameters in this program",
            where="the plan",
            todo="name a module or parameter that the plan lists",
        )
    return "\n".join(map(str, explanations(program, cost, pins, wanted)))


def explanations(
    program: GlobalProgram, cost: CostModel, pins: Pins, names: Container[str]
) -> Iterator[Explanation]:
    """Explains parameters of the program, in its order; see ``explain_module``."""
    facts = Facts(program, program.planned_factors, cost)
    prices = [_Prices(program, facts, pins, axis) for axis in range(len(program.decisions))]
    for param, name in program.params().items():
        if name in names:
            yield _explain(program, facts, prices, param)


def _explain(program: GlobalProgram, facts: Facts, prices: Sequence[_Prices], param: Node) -> Explanation:
    factors, decisions = facts.factors, []
    for axis, decision in enumerate(program.decisions):
        others = [o for o in _options(factors, param) if o != decision.params[param]]
        priced = tuple((option, prices[axis].of(param, option)) for option in others)
        label = f" on sub-axis {axis} of {decision.ranks}" if len(program.decisions) > 1 else ""
        decisions.append(Decision(label, decision.params[param], priced))
    uses = tuple(f"{u.name} = {target_text(u)}: {factors.rules.get(u, 'no call')}" for u in param.users)
    return Explanation(program.sources[param].spec.name, _factored(factors, param), uses, tuple(decisions))


def _options(factors: Factors, param: Node) -> list[Placement]:
    return [R, *(Shard(*place) for place in factors.places(param))]


class _Prices:
    """What the alternatives on one sub-axis cost: those of all parameters at once, where that says enough."""

    def __init__(self, program: GlobalProgram, facts: Facts, pins: Pins, axis: int) -> None:
        self._program, self._facts, self._pins, self._axis = program, facts, pins(program, axis), axis
        others = {a: d for a, d in enumerate(program.decisions) if a != axis}
        self._others = others
        self._problem = AxisProblem(facts, program.axis_sizes, axis, others, self._pins).build()
        self._extras = self._problem.extras()

    def of(self, param: Node, option: Placement) -> str:
        """What it costs to hold a parameter so, or why it is refused."""
        facts = self._facts
        if isinstance(option, Shard):
            atom = facts.factors.places(param)[option.dim, option.factor]
            if atom not in facts.candidates:
                return "refused: this dimension is dynamic, or no matmul has it"
        extra = self._extras[param].get(option, math.inf)
        if extra < _PENALTY:
            return f"+{time_text(extra)}"
        try:
            other = self._with(param, option)
        except TpCompileError as error:
            spent = error.where == facts.params[param]
            return f"refused: {'nothing is left to divide' if spent else _refusal(facts, param)}"
        decisions = self._program.decisions
        extra = other.cost + other.price - sum(d.cost + d.price for d in decisions)
        penalty = sum(d.penalty for d in decisions)
        must = ", but a large matrix must be divided" if round(other.penalty - penalty, 6) > 0 else ""
        return f"{'+' if extra >= 0 else '-'}{time_text(abs(extra))}{must}"

    def _with(self, param: Node, option: Placement) -> Assignment:
        """The best decisions that hold a parameter so, whatever was asked of it."""
        if option in self._problem.holdings[param]:
            return self._problem.solve(param, option)
        pins = {**self._pins, param: frozenset({option})}
        return solve_axis(self._facts, self._program.axis_sizes, self._axis, self._others, pins)


def _refusal(facts: Facts, param: Node) -> str:
    reasons = []
    for user in param.users:
        rule = facts.factors.rules.get(user)
        if isinstance(rule, str):
            reasons.append(f"{target_text(user)}: {rule}")
        elif isinstance(rule, Rule) and rule.whole:
            reasons.append(f"{target_text(user)} wants {', '.join(sorted(rule.whole))} whole")
    return "; ".join(reasons) or "a weight is not gathered, and no user takes it so"


def _factored(factors: Factors, param: Node) -> str:
    texts = [" ".join(map(str, sizes)) or "1" for sizes in factors.atom_sizes(param)]
    return "[" + ", ".join(f"({t})" if " " in t else t for t in texts) + "]"

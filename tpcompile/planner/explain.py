"""Says why a parameter lies as it does: what the alternatives would have cost, what rules refused."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from tpcompile.errors import TpCompileError
from tpcompile.ir.placements import Placement, R, Shard
from tpcompile.ir.print_graph import target_text
from tpcompile.ir.units import time_text
from tpcompile.planner.search.axis_problem import solve_axis
from tpcompile.planner.search.cost import CostModel
from tpcompile.planner.search.facts import Facts
from tpcompile.rules.factors import Factors
from tpcompile.rules.rule import Rule

from .decide import Pins
from .work import Work


def explain_module(work: Work, cost: CostModel, pins: Pins, name: str) -> str:
    """The explanation of ``Plan.explain``.

    Args:
        work: the planned program, before it was rewritten.
        cost: the cost model it was planned with.
        pins: what parameters were held to; alternatives respect those of the others.
        name: a module or parameter.

    Raises:
        TpCompileError: no parameter of the program belongs to that name.
    """
    assert work.planned_factors is not None
    # Of layers that repeat only some were planned: the others are explained by the one that they copy.
    names = list(dict.fromkeys(work.params().values()))
    copies = [] if work.blocks is None else work.blocks.left_out(names)
    like = {p: p for p in names} | {copy: kept for kept, copy in copies}
    wanted = {kept for p, kept in like.items() if p == name or p.startswith(name + ".")}
    mine = [n for n, p in work.params().items() if p in wanted]
    if not mine:
        raise TpCompileError(
            f"{name!r} has no parameters in this program",
            where="the plan",
            todo="name a module or parameter that the plan lists",
        )
    factors = work.planned_factors
    facts = Facts(work, factors, cost)
    return "\n".join(line for param in mine for line in _explain_param(work, facts, pins, param))


def _explain_param(work: Work, facts: Facts, pins: Pins, param: Node) -> Iterator[str]:
    factors = work.planned_factors
    assert factors is not None
    yield f"{work.sources[param].spec.name} {_factored(factors, param)}"
    for user in param.users:
        yield f"  used by {user.name} = {target_text(user)}: {factors.rules.get(user, 'no call')}"
    for axis, decision in enumerate(work.decisions):
        label = f" on sub-axis {axis} of {decision.ranks}" if len(work.decisions) > 1 else ""
        yield f"  chosen{label}: {decision.params[param]}"
        for option in _options(factors, param):
            if option != decision.params[param]:
                yield f"    {option}: {_price(work, facts, pins, param, option, axis)}"


def _options(factors: Factors, param: Node) -> list[Placement]:
    return [R, *(Shard(*place) for place in factors.places(param))]


def _price(work: Work, facts: Facts, pins: Pins, param: Node, option: Placement, axis: int) -> str:
    others = {a: d for a, d in enumerate(work.decisions) if a != axis}
    if isinstance(option, Shard):
        atom = facts.factors.places(param)[option.dim, option.factor]
        if atom not in facts.candidates:
            return "refused: this dimension is dynamic, or no matmul has it"
    try:
        other = solve_axis(facts, work.axes, axis, others, {**pins(work, axis), param: frozenset({option})})
    except TpCompileError as error:
        spent = error.where == facts.params[param]
        return f"refused: {'nothing is left to divide' if spent else _refusal(facts, param)}"
    extra = other.cost + other.price - sum(d.cost + d.price for d in work.decisions)
    penalty = sum(d.penalty for d in work.decisions)
    must = ", but a large matrix must be divided" if round(other.penalty - penalty, 6) > 0 else ""
    return f"{'+' if extra >= 0 else '-'}{time_text(abs(extra))}{must}"


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

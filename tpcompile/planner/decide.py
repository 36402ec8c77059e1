"""The planner's outer decisions: which packed matmuls to split, into which sub-axes to cut the axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch.fx import Node

from tpcompile.ir.nodes import tensor_of
from tpcompile.ir.placements import Placement, Shard, split_evenly
from tpcompile.planner.search.cost import CostModel
from tpcompile.planner.search.facts import Facts
from tpcompile.planner.search.must_divide import worth_dividing
from tpcompile.planner.search.solve_axes import solve_axes
from tpcompile.planner.search.sub_axes import sub_axes, unit_counts
from tpcompile.rules.declared import check_declared, declared_units, fits

from .global_program import GlobalProgram

# The placements allowed for parameters of a program, on one of its sub-axes.
Pins = Callable[[GlobalProgram, int], Mapping[Node, frozenset[Placement]]]
Splitter = Callable[[GlobalProgram, frozenset[str]], GlobalProgram]


def decide(
    program: GlobalProgram,
    cost: CostModel,
    groups: list[str],
    split: Splitter,
    pins: Pins,
    divide_small: bool = False,
) -> GlobalProgram:
    """The program with the least penalty, then the least price and time, then the least memory.

    Args:
        program: the canonical program.
        cost: the cost model.
        groups: packed matmuls that could be split.
        split: gives a copy of a program with some groups split.
        pins: the placements allowed for the parameters of a program.
        divide_small: small matrices must be divided too.
    """

    def plan(chosen: frozenset[str], axis_sizes: tuple[int, ...]) -> GlobalProgram:
        return plan_on_axes(split(program, chosen), axis_sizes, cost, pins, divide_small)

    whole_axis, factors = (program.ranks,), program.factors()
    if not fits(factors, whole_axis):
        return split_what_pays(plan, sub_axes(program.ranks, declared_units(factors)), groups)
    best = split_what_pays(plan, whole_axis, groups)
    factors = best.planned_factors
    units = unit_counts(factors, best.params(), worth_dividing(factors, set(best.params())))
    axis_sizes = sub_axes(program.ranks, units)
    if len(axis_sizes) > 1 and fits(factors, axis_sizes):
        other = split_what_pays(plan, axis_sizes, groups)
        if _worth(other) < _worth(best):
            best = other
    return best


def split_what_pays(
    plan: Callable[[frozenset[str], tuple[int, ...]], GlobalProgram],
    axis_sizes: tuple[int, ...],
    groups: list[str],
    chosen: frozenset[str] = frozenset(),
) -> GlobalProgram:
    """The program with those packed matmuls split whose splitting makes it better, one after the other.

    Args:
        plan: plans a program with some groups split.
        axis_sizes: the sub-axes to plan on.
        groups: what could be split.
        chosen: what is split in any case.
    """
    best = plan(chosen, axis_sizes)
    for group in (g for g in groups if g not in chosen):
        trial = plan(chosen | {group}, axis_sizes)
        if _score(trial) < _score(best) and _fits_together(trial):
            best, chosen = trial, chosen | {group}
    return best


def plan_on_axes(
    program: GlobalProgram,
    axis_sizes: tuple[int, ...],
    cost: CostModel,
    pins: Pins,
    divide_small: bool = False,
) -> GlobalProgram:
    """The program with the decisions on each sub-axis."""
    factors = program.factors()
    check_declared(factors, axis_sizes)
    facts = Facts(program, factors, cost, divide_small)
    decisions = solve_axes(facts, axis_sizes, lambda axis: pins(program, axis))
    return replace(program, decisions=decisions, decided=factors)


def _penalty(program: GlobalProgram) -> float:
    return round(sum(d.penalty for d in program.decisions), 6)


def _held(program: GlobalProgram) -> float:
    """Bytes of parameters on the fullest rank, to three digits."""
    total = 0.0
    for node in program.params():
        size = float(tensor_of(node).numel() * tensor_of(node).element_size())
        left = {
            place: program.planned_factors.size(a)
            for place, a in program.planned_factors.places(node).items()
        }
        for decision in program.decisions:
            placement = decision.params[node]
            if isinstance(placement, Shard):
                units = left[placement.dim, placement.factor]
                most = split_evenly(int(units), decision.ranks)[0]
                left[placement.dim, placement.factor] = most
                size = size * most / int(units)
        total += size
    return float(f"{total:.3g}")


def _fits_together(program: GlobalProgram) -> bool:
    """Whether the segments of every parameter can stand one behind the other in one local tensor.

    They may be divided differently along the dimension in which they differ; along any other all must be
    divided alike, or their local sizes there would not be the same.
    """
    held: dict[str, set[object]] = {}
    for node, name in program.params().items():
        if name in program.packed_dims:
            layout = program.planned_factors.atom_sizes(node)
            others = [_except(d.params[node], program.packed_dims[name]) for d in program.decisions]
            key = tuple((p, layout[p.dim][p.factor]) if p else None for p in others)
            held.setdefault(name, set()).add(key)
    return all(len(ways) == 1 for ways in held.values())


def _except(placement: Placement, dim: int) -> Shard | None:
    return placement if isinstance(placement, Shard) and placement.dim != dim else None


def _score(program: GlobalProgram) -> tuple[float, float]:
    # Rounded, so that a split that changes nothing is not made for the last bit of a sum.
    return _penalty(program), float(f"{sum(d.cost for d in program.decisions):.6g}")


def _worth(program: GlobalProgram) -> tuple[float, float, float]:
    """What plans on other sub-axes are compared by."""
    return _penalty(program), float(f"{sum(d.price + d.cost for d in program.decisions):.6g}"), _held(program)

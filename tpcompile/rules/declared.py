"""Placements that a custom strategy declares, on the sub-axes of a plan.

A declared shard is cut over all ranks by rows. In the compiler's terms that is a division of the dimension's
factors, major first, by one sub-axis after the other: with 2 key heads of 4 query heads each, 4 ranks as
``2 x 2`` divide the first factor, then the second. Where the ranks cannot be cut like that, some unit would
be on two of them, and the plan has no name for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.fx import Node

from tpcompile.errors import TpCompileError
from tpcompile.ir.nodes import operands
from tpcompile.ir.placements import Placement, Shard
from tpcompile.ir.sizes import Size

from .factors import Factors
from .rule import Declared, Rule


def placements_on(
    factors: Factors, node: Node, declared: Declared, axis_sizes: Sequence[int]
) -> list[Placement]:
    """The declared placements of operands, then results, on the last of these sub-axes.

    Raises:
        TpCompileError: they cannot be had there.
    """
    found: list[Placement] = []
    for value, placement in _declared(node, declared):
        if isinstance(placement, Shard):
            divided = _divide(factors.atom_sizes(value)[placement.dim], placement.factor, axis_sizes)
            if divided is None:
                raise _misfit(factors, node, value, placement, axis_sizes)
            placement = Shard(placement.dim, divided[-1])
        found.append(placement)
    return found


def check_declared(factors: Factors, axis_sizes: Sequence[int]) -> None:
    """Refuses declared placements that this program's values cannot have on these sub-axes.

    Raises:
        TpCompileError: a unit would be on two ranks, or sizes are not known.
    """
    for node, declared in _nodes(factors):
        placements_on(factors, node, declared, axis_sizes)


def fits(factors: Factors, axis_sizes: Sequence[int]) -> bool:
    """Whether declared placements can be had on these sub-axes."""
    try:
        check_declared(factors, axis_sizes)
    except TpCompileError:
        return False
    return True


def declared_units(factors: Factors) -> set[int]:
    """Counts of units by which declared shards are divided: they may ask for sub-axes."""
    found: set[int] = set()
    for node, declared in _nodes(factors):
        for value, placement in _declared(node, declared):
            if isinstance(placement, Shard):
                sizes, units = factors.atom_sizes(value)[placement.dim][placement.factor :], 1
                for size in sizes:
                    if isinstance(size, int):
                        units *= size
                        found.add(units)
    return found


def _nodes(factors: Factors) -> Iterator[tuple[Node, Declared]]:
    for node, rule in factors.rules.items():
        if isinstance(rule, Rule) and rule.declared is not None:
            yield node, rule.declared


def _declared(node: Node, declared: Declared) -> Iterator[tuple[Node, Placement]]:
    yield from zip(operands(node), declared.inputs, strict=True)
    yield node, declared.outputs[0]


def _divide(sizes: Sequence[Size], first: int, axis_sizes: Sequence[int]) -> list[int] | None:
    """Per sub-axis, the factor that it divides; None if there is no such way."""
    at, left = first, sizes[first] if first < len(sizes) else 1
    found = []
    for ranks in axis_sizes:
        while left == 1 and ranks > 1 and at + 1 < len(sizes):
            at, left = at + 1, sizes[at + 1]
        if not isinstance(left, int) or left % ranks:
            return None
        left //= ranks
        found.append(at)
    return found


def _misfit(
    factors: Factors, node: Node, value: Node, placement: Shard, axis_sizes: Sequence[int]
) -> TpCompileError:
    sizes = " x ".join(map(str, factors.atom_sizes(value)[placement.dim])) or "1"
    ranks = " x ".join(map(str, axis_sizes))
    side = "output_layouts" if value is node else "input_layouts"
    return TpCompileError(
        f"a custom strategy declares {placement} of a value whose dimension {placement.dim} is {sizes}, "
        f"which {ranks} ranks do not divide evenly by rows",
        where=str(node.args[2]),
        todo=f"declare Replicate() as its {side} and divide or gather in the strategy, "
        "or leave the module to the planner",
    )

"""What a rewritten program communicates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.fx import Node

from tpcompile.ir import markers
from tpcompile.ir.names import starred
from tpcompile.ir.nodes import arguments, module_path, tensor_of
from tpcompile.ir.placements import Filled, Shard
from tpcompile.ir.sizes import bytes_of
from tpcompile.planner.search.cost import CostModel

from .global_program import GlobalProgram

WHEN_USED = " (when it is used)"
"""What is said of a result that is gathered by whoever uses it."""


@dataclass(frozen=True)
class Collective:
    """One kind of collective at one place of the model (numbered blocks counted together).

    Attributes:
        kind: ``all_reduce``, ``all_gather``, ...
        where: the module, ``*`` for block numbers.
        count: how many a forward issues.
        bytes: what one of them moves, for the example's sizes (the whole value).
    """

    kind: str
    where: str
    count: int
    bytes: int


def collectives_of(program: GlobalProgram) -> tuple[Collective, ...]:
    """What a rewritten program communicates in one forward, counted per place."""
    found: dict[tuple[str, str, int], int] = {}
    later = _when_used(program)
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in markers.COMMUNICATING:
            where = starred(module_path(node)) + (WHEN_USED if node in later else "")
            key = (node.target.__name__, where, _moved(node))
            found[key] = found.get(key, 0) + program.times(node)
    return tuple(Collective(kind, where, count, size) for (kind, where, size), count in found.items())


def _when_used(program: GlobalProgram) -> set[Node]:
    """The gathers of results that a loss is computed from: they are left to whoever uses the result."""
    found, above = set[Node](), program.above_losses()
    for out in program.outputs():
        gathers: list[Node] = []
        while isinstance(out, Node) and out.target is markers.all_gather and _serves_results(out):
            gathers.append(out)
            out = arguments(out)[0]
        if out in above:
            found.update(gathers)
    return found


def _serves_results(gather: Node) -> bool:
    place = arguments(gather)[2]
    in_one_piece = isinstance(place, Shard) and not place.factor
    return in_one_piece and all(u.op == "output" or u.target is markers.all_gather for u in gather.users)


def sequence_seconds(program: GlobalProgram, cost: CostModel) -> float:
    """What the collectives along a divided sequence take more than those that were planned."""
    total = 0.0
    for node in program.graph.nodes:
        if node.op == "call_function" and any(isinstance(a, Filled) for a in node.args):
            size, axes, sizes = _moved(node), arguments(node)[1], program.axis_sizes
            ranks, near = math.prod(sizes[a] for a in axes), cost.near(axes, sizes)
            match node.target:
                case markers.reduce_scatter:  # an all-reduce is planned
                    more = cost.all_gather(size, ranks, near) - cost.all_reduce(size, ranks, near)
                case markers.all_to_all:
                    more = cost.all_to_all(size, ranks, near) - cost.all_gather(size, ranks, near)
                case markers.all_gather:
                    more = cost.all_gather(size, ranks, near)
                case _:
                    more = 0.0
            total += more * program.times(node)
    return total


def _moved(node: Node) -> int:
    moved = arguments(node)[0]
    return int(sum(bytes_of(tensor_of(v)) for v in (moved if isinstance(moved, list | tuple) else [moved])))

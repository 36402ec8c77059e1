"""The planner's decisions as plain data: for rank 0's broadcast, for plans on disk, for fingerprints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from tpcompile.errors import TpCompileError
from tpcompile.ir.placements import parse_placement
from tpcompile.rules.assignment import Assignment
from tpcompile.rules.choices import choices

from .global_program import GlobalProgram


def decisions_to_data(program: GlobalProgram) -> list[dict[str, Any]]:
    """Per sub-axis: its size, every call's choice, every parameter's and shared value's placement."""
    axis_sizes = program.axis_sizes
    return [
        {
            "ranks": d.ranks,
            "nodes": {
                n.name: _index(program, n, d, axis_sizes[: i + 1]) for n in d.nodes if len(d.nodes[n].outputs)
            },
            "params": {n.name: str(p) for n, p in d.params.items()},
            "shared": {n.name: str(p) for n, p in d.shared.items()},
            "penalty": d.penalty,
            "price": d.price,
            "cost": d.cost,
        }
        for i, d in enumerate(program.decisions)
    ]


def _options(program: GlobalProgram, node: Node, axis_sizes: Sequence[int]) -> list[Any]:
    return choices(node, program.planned_factors, lambda _: True, axis_sizes)


def _index(program: GlobalProgram, node: Node, decision: Assignment, axis_sizes: Sequence[int]) -> int:
    return _options(program, node, axis_sizes).index(decision.nodes[node])


def decisions_from_data(program: GlobalProgram, data: list[dict[str, Any]]) -> None:
    """Gives a program the decisions that were made elsewhere for the same graph.

    Raises:
        TpCompileError: they are not about this graph.
    """
    program.decided = program.factors()
    by_name = {n.name: n for n in program.graph.nodes}
    axis_sizes = [d["ranks"] for d in data]
    try:
        program.decisions = [
            Assignment(
                d["ranks"],
                {
                    by_name[n]: _options(program, by_name[n], axis_sizes[: a + 1])[i]
                    for n, i in d["nodes"].items()
                },
                {by_name[n]: parse_placement(p) for n, p in d["params"].items()},
                {by_name[n]: parse_placement(p) for n, p in d["shared"].items()},
                d["penalty"],
                d["price"],
                d["cost"],
            )
            for a, d in enumerate(data)
        ]
    except (KeyError, IndexError) as error:
        raise TpCompileError(
            f"the plan is about another graph ({error} is not in this one)",
            where="plan",
            todo="plan for this model and these inputs",
        ) from error

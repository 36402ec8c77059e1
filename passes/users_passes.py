"""What passes of a user's own, which run behind the plan, may not change."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from tpcompile.errors import TpCompileError
from tpcompile.ir.markers import MARKERS, origin
from tpcompile.ir.nodes import module_path
from tpcompile.planner.global_program import GlobalProgram, Pass


def premises_of(program: GlobalProgram) -> dict[str, object]:
    """What a proof takes as given: a pass that changed it could have anything proved."""
    return {
        "where inputs come from": dict(program.sources),
        "what results are": program.captured.outputs,
        "what was decided": [(d.ranks, dict(d.params), dict(d.nodes)) for d in program.decisions],
        "the factors that were planned": (id(program.planned_factors), program.packed_dims.copy()),
        "where weights and caches are stored": (program.layout, [*program.caches], dict(program.refused)),
    }


def refuse_other_premises(program: GlobalProgram, before: dict[str, object], made_by: Pass) -> None:
    """Refuses what a pass has changed beside the graph.

    Raises:
        TpCompileError: something is other than ``premises_of`` has found before.
    """
    now = premises_of(program)
    for what, value in before.items():
        if now[what] != value:
            raise TpCompileError(
                f"the pass {made_by.name} changes {what}",
                where=f"pass {made_by.name}",
                todo="change the graph alone; where weights are stored is asked for by pins of a plan",
            )


def refuse_unplanned(program: GlobalProgram, known: set[Node], made_by: Pass) -> None:
    """Whatever computes was planned; behind the plan only changes of placement are new.

    Raises:
        TpCompileError: a pass has added a call of another kind.
    """
    for node in program.graph.nodes:
        new = node.op == "call_function" and node not in known and node.target not in MARKERS
        if new and origin(node) is node and isinstance(node.meta["val"], Tensor | tuple | list):  # not a size
            raise TpCompileError(
                f"the pass {made_by.name} adds a call of {node.target}, which the planner has not seen",
                where=f"{node.name} in {module_path(node) or 'the model'}",
                todo="set before_planning = True in the pass: then the planner plans what it makes",
            )

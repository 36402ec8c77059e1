"""What cannot be lowered as planned is named, to be planned again: calls whole, layers one by one."""

from __future__ import annotations

from collections.abc import Iterator

from torch.fx import Node

from tpcompile.errors import TpCompileError
from tpcompile.ir.markers import MARKERS, MERGED, origin
from tpcompile.ir.nodes import module_path, producer
from tpcompile.ir.placements import R
from tpcompile.planner.global_program import Alike, alike

LAYERS: Alike = ("repeated layers", "")
"""Stands among the calls to blame for repeated layers that the plan does not treat alike."""


class CannotLower(TpCompileError):
    """A call cannot be lowered as it was planned.

    Attributes:
        calls: the calls to blame, as ``GlobalProgram.refused`` names them.
    """

    calls: frozenset[Alike] = frozenset()


def cannot_lower(node: Node, error: Exception) -> TpCompileError:
    """The error for a node whose lowering failed: a user sees it only where nothing is divided.

    Of a change of placement, and of calls that were merged, all calls around it are to blame.
    """
    moves = node.target in (*MARKERS, *MERGED)
    blamed = {n for n in (_around(node) if moves else [node]) if _is_divided(n)}
    why = " ".join(str(error).split())[:200] or type(error).__name__
    where = f"{node.name} ({getattr(node.target, '__name__', node.target)}) in {module_path(node)}"
    if not blamed:
        return TpCompileError(
            f"a call does not run in a lowered program: {why}", where=where, todo="report this"
        )
    found = CannotLower(f"it does not run on a rank's part: {why}", where=where)
    found.calls = frozenset(map(alike, blamed))
    return found


def layers_differ(error: TpCompileError) -> CannotLower:
    """The error for layers of which the last cannot stand for others: each is to be planned by itself."""
    found = CannotLower(error.what, where=error.where)
    found.calls = frozenset({LAYERS})
    return found


def _around(node: Node) -> Iterator[Node]:
    """The calls whose values a node takes, and those that use what it gives."""
    yield from (producer(origin(value))[0] for value in node.all_input_nodes)
    for user in node.users:
        if "choices" in user.meta:
            yield user
        else:
            yield from _around(user)


def _is_divided(node: Node) -> bool:
    choices = node.meta.get("choices") or ()
    return any(p != R for c in choices if c is not None for p in (*c.inputs, *c.outputs))

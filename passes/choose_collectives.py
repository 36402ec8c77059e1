"""ChooseCollectives: abstract reshards become collectives on sub-axes."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from tpcompile.errors import TpCompileError
from tpcompile.ir import markers
from tpcompile.ir.conversions import steps
from tpcompile.ir.graph_edit import call_before, replace
from tpcompile.ir.nodes import arguments
from tpcompile.ir.placements import R
from tpcompile.planner.global_program import GlobalProgram, Pass


@dataclass(frozen=True)
class ChooseCollectives(Pass):
    """Replaces ``reshard`` by all-reduce, reduce-scatter, all-gather, all-to-all or local moves.

    ``P -> R`` all-reduce, ``P -> S`` reduce-scatter, ``S -> R`` all-gather, ``S -> S`` all-to-all;
    ``R -> S``, ``R -> P`` and ``S -> P`` move nothing. Sub-axes that do the same go in one collective,
    and what shrinks a value comes before what moves it.
    """

    name = "choose-collectives"

    def apply(self, program: GlobalProgram) -> bool:
        found = program.graph.find_nodes(op="call_function", target=markers.reshard)
        for node in found:
            value, src, dst = arguments(node)
            for target, options, after in steps(src, dst):
                if target is markers.mask_rows:
                    options = (*options, _whole_value(program, options[1].ids))
                value = call_before(node, target, value, *options)
                value.meta["placement"] = after
            replace(node, value)
        return bool(found)


def _whole_value(program: GlobalProgram, name: str) -> Node:
    """The value of that name, which says each row's expert and must be whole."""
    found = next(n for n in program.graph.nodes if n.name == name)
    if any(p != R for p in found.meta.get("placement", ())):
        raise TpCompileError(
            f"{name} is divided, but says whose rows are whose",
            where="choose-collectives",
            todo="report this plan",
        )
    return found

"""Passes of a user's own: what they may do behind the plan, and what is refused by a sentence."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.fx import Node

from tests.helpers import programs, toys
from tpcompile.errors import TpCompileError
from tpcompile.ir import markers
from tpcompile.ir.placements import R
from tpcompile.pipeline import canonical, plan_program, rewrite
from tpcompile.planner.global_program import GlobalProgram, Pass
from tpcompile.planner.search.cost import PRESETS


def _calls(program: GlobalProgram) -> list[Node]:
    return [n for n in program.graph.nodes if n.op == "call_function"]


@dataclass(frozen=True)
class Edits(Pass):
    """A user's pass that edits the sums over ranks, or what is known of the program."""

    edit: Callable[[GlobalProgram], Any]
    name = "edits"

    def apply(self, program: GlobalProgram) -> bool:
        self.edit(program)
        return True


def _sums(program: GlobalProgram) -> list[Node]:
    return [n for n in _calls(program) if n.target is markers.all_reduce]


def _dropped(program: GlobalProgram) -> None:
    for node in _sums(program):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]


def _said_to_be_a_cache(program: GlobalProgram) -> None:
    _dropped(program)
    program.captured.outputs = tuple(replace(spec, divided=True) for spec in program.captured.outputs)


def _all_said_to_be_whole(program: GlobalProgram) -> None:
    _dropped(program)
    for node in program.graph.nodes:
        node.meta.pop("choices", None)
        if "placement" in node.meta:
            node.meta["placement"] = (R,) * len(node.meta["placement"])


def _sources_exchanged(program: GlobalProgram) -> None:
    one, two, *_ = program.sources
    program.sources[one], program.sources[two] = program.sources[two], program.sources[one]


def _stored_as_whole(program: GlobalProgram) -> None:
    for decision in program.decisions:
        decision.params.update(dict.fromkeys(decision.params, R))


def _joined(program: GlobalProgram) -> None:
    """Each sum travels as the only one of several that travel together."""
    for node in _sums(program):
        val = node.meta["val"]
        with program.graph.inserting_before(node):
            args = ([node.args[0]], *node.args[1:])
            together = program.graph.call_function(markers.all_reduce_coalesced, args)
            part = program.graph.call_function(operator.getitem, (together, 0))
        together.meta.update(node.meta, val=[val])
        part.meta.update(node.meta)
        node.replace_all_uses_with(part)


def _part_of_no_call(program: GlobalProgram) -> None:
    _joined(program)
    for node in _calls(program):
        if node.target is operator.getitem:
            node.update_arg(0, node.args[0].args[0])  # type: ignore[union-attr, arg-type]


EDITS: dict[str, tuple[Callable[[GlobalProgram], Any], str]] = {
    "dropped": (_dropped, r"cannot be proved: its rule computes nothing from \(R, P\(sum\)\)"),
    "all is whole": (_all_said_to_be_whole, "is said to be R, and is S"),
    "no sub-axes": (lambda p: [n.update_arg(1, ()) for n in _sums(p)], "are not sub-axes"),
    "twice over one": (lambda p: [n.update_arg(1, (0, 0)) for n in _sums(p)], "are not sub-axes"),
    "of another kind": (lambda p: [n.update_arg(2, "avg") for n in _sums(p)], "op is 'avg'"),
    "by name": (
        lambda p: [
            setattr(n, "kwargs", {"axes": n.args[1], "op": n.args[2]}) or setattr(n, "args", n.args[:1])
            for n in _sums(p)
        ],
        "by position",
    ),
    "a lambda": (lambda p: [setattr(n, "target", lambda x, axes, op: x) for n in _sums(p)], "be proved"),
    "of another shape": (
        lambda p: [n.meta.update(val=n.meta["val"].new_empty(3)) for n in _sums(p)],
        "has 1 dimensions and its operand 3",
    ),
    "a cache": (_said_to_be_a_cache, "edits changes what results are"),
    "sources": (_sources_exchanged, "edits changes where inputs come from"),
    "stored": (_stored_as_whole, "edits changes what was decided"),
    "a part of no call": (_part_of_no_call, "takes a part of what no call has computed"),
    "nothing decided": (lambda p: p.decisions.clear(), "edits changes what was decided"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_passes_that_mean_harm(kind: str) -> None:
    """A pass that breaks a program, or what its proof goes out from, is refused by a sentence."""
    edit, why = EDITS[kind]
    program = programs.captured(toys.Mlp(), torch.randn(3, 7, 12))
    planned = plan_program(canonical(program.captured, 2), PRESETS["cpu"], lambda *_: {})
    with pytest.raises(TpCompileError, match=why):
        rewrite(planned, training=True, extra=[Edits(edit)])


def test_a_pass_of_the_users_may_join_sums() -> None:
    """What travels together is a change of placement as any other, and is proved."""
    program = programs.captured(toys.Mlp(), torch.randn(3, 7, 12))
    planned = plan_program(canonical(program.captured, 2), PRESETS["cpu"], lambda *_: {})
    rewrite(planned, training=True, extra=[Edits(_joined)])
    assert planned.proof is not None
    assert any(n.target is markers.all_reduce_coalesced for n in _calls(planned))

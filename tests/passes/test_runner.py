"""The runner and the verifier: what is refused, what an error says, what is written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import Node

from tests.helpers import programs, toys
from tpcompile import pipeline
from tpcompile.errors import TpCompileError
from tpcompile.ir.graph_edit import call_behind
from tpcompile.passes.canonicalise import Canonicalise
from tpcompile.passes.pipeline import run_passes
from tpcompile.passes.verify_graph import verify_graph
from tpcompile.pipeline import after_planning, canonical, plan_program, rewrite
from tpcompile.planner.global_program import GlobalProgram, Pass
from tpcompile.planner.search.cost import PRESETS

PROGRAM = programs.captured(toys.Mlp(), torch.randn(3, 7, 12))


def _calls(program: GlobalProgram) -> list[Node]:
    return [n for n in program.graph.nodes if n.op == "call_function"]


def _users_first(program: GlobalProgram) -> None:
    last, first = _calls(program)[-1], _calls(program)[0]
    first.prepend(last)


def _no_value(program: GlobalProgram) -> None:
    del _calls(program)[0].meta["val"]


def _real_value(program: GlobalProgram) -> None:
    _calls(program)[0].meta["val"] = torch.zeros(3)


def _unknown_input(program: GlobalProgram) -> None:
    first = _calls(program)[0]
    with program.graph.inserting_before(first):
        program.graph.placeholder("surprise").meta["val"] = first.meta["val"]


def _attribute(program: GlobalProgram) -> None:
    with program.graph.inserting_before(_calls(program)[0]):
        program.graph.create_node("get_attr", "weight").meta["val"] = _calls(program)[0].meta["val"]


def _foreign_node(program: GlobalProgram) -> None:
    other = PROGRAM.copy()
    _calls(program)[1].args = (_calls(other)[0],)


BROKEN: dict[str, tuple[Callable[[GlobalProgram], None], str]] = {
    "users before operands": (_users_first, "before it has been defined"),
    "no value": (_no_value, "node linear has no value"),
    "real data": (_real_value, "linear holds real data"),
    "input without a source": (_unknown_input, "input surprise has no source"),
    "attribute": (_attribute, "nonexistent attribute"),
    "node of another graph": (_foreign_node, "invalid graph"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_graphs_are_refused(name: str) -> None:
    spoil, message = BROKEN[name]
    program = PROGRAM.copy()
    verify_graph(program, "capture")
    spoil(program)
    with pytest.raises(TpCompileError, match=message) as caught:
        verify_graph(program, "capture -> spoil")
    assert "capture -> spoil" in str(caught.value)


@dataclass(frozen=True)
class Spoil(Pass):
    """Leaves a graph that is wrong, or lies."""

    name = "spoil"
    how: Callable[[GlobalProgram], None]
    changed: bool = True

    def apply(self, program: GlobalProgram) -> bool:
        self.how(program)
        return self.changed


def test_the_error_names_the_passes() -> None:
    with pytest.raises(TpCompileError, match="after canonicalise -> spoil"):
        run_passes(PROGRAM.copy(), [Canonicalise(), Spoil(_no_value), Canonicalise()])


def _fails(program: GlobalProgram) -> None:
    raise KeyError("x")


def test_any_error_of_a_pass_tells_where() -> None:
    with pytest.raises(KeyError) as caught:
        run_passes(PROGRAM.copy(), [Canonicalise(), Spoil(_fails)])
    assert caught.value.__notes__ == ["in the last of these passes: canonicalise -> spoil"]


def _erases(program: GlobalProgram) -> None:
    relu = _calls(program)[1]
    relu.replace_all_uses_with(relu.args[0])  # type: ignore[arg-type]
    program.graph.erase_node(relu)


def test_a_pass_that_denies_its_change_is_refused() -> None:
    with pytest.raises(TpCompileError, match="spoil says that it changed nothing"):
        run_passes(PROGRAM.copy(), [Spoil(_erases, changed=False)])
    run_passes(PROGRAM.copy(), [Spoil(_erases)])


def test_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass that changed something leaves a numbered file, headed by its name and the calls added."""
    program = programs.planned(toys.Mlp(), torch.randn(3, 7, 12))
    monkeypatch.setenv("TPCOMPILE_LOGS", str(tmp_path))
    run_passes(program, after_planning(training=True))
    files = sorted(tmp_path.iterdir())
    names = [f.stem.split("-", 1)[1] for f in files]
    nothing_to_do = ("coalesce-collectives", "merge-matmuls")
    assert names == [p.name for p in after_planning(training=True) if p.name not in nothing_to_do]
    assert [f.stem.split("-")[0] for f in files] == sorted(f.stem.split("-")[0] for f in files)
    inserted = files[1].read_text()
    assert inserted.startswith(f"# {files[1].stem}: +2 calls\n")
    assert "= reshard(" in inserted


def test_no_logs_without_being_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TPCOMPILE_LOGS", raising=False)
    monkeypatch.chdir(tmp_path)
    run_passes(programs.planned(toys.Mlp(), torch.randn(3, 7, 12)), after_planning(training=False))
    assert not list(tmp_path.iterdir())


def test_options_are_fields() -> None:
    assert [p.name for p in after_planning(training=False)] == [p.name for p in after_planning(training=True)]
    with pytest.raises(AttributeError):
        Canonicalise().name = "other"  # type: ignore[misc]


@dataclass(frozen=True)
class AddNegations(Pass):
    """Two calls behind the first matmul that change nothing together."""

    name = "add-negations"

    def apply(self, program: GlobalProgram) -> bool:
        first = next(n for n in _calls(program) if n.target is torch.ops.aten.linear.default)
        users = list(first.users)
        placement = first.meta.get("placement")
        once = call_behind(first, torch.ops.aten.neg.default, first, placement=placement)
        twice = call_behind(once, torch.ops.aten.neg.default, once, placement=placement)
        for user in users:
            user.replace_input_with(first, twice)
        return True


class AddNegationsBeforePlanning(AddNegations):
    """The same, where the planner still sees it."""

    before_planning = True


def test_a_pass_of_the_users_that_makes_calls_runs_before_planning() -> None:
    """And is planned: what it makes is divided as its operand is."""
    program = programs.captured(toys.Mlp(), torch.randn(3, 7, 12))
    passes = [AddNegationsBeforePlanning()]
    planned = plan_program(canonical(program.captured, 2, passes), PRESETS["cpu"], lambda *_: {})
    rewrite(planned, training=False, extra=passes)
    made = [n.meta["placement"] for n in _calls(planned) if n.target is torch.ops.aten.neg.default]
    assert [str(p) for (p,) in made] == ["S(2)", "S(2)"]


def test_a_pass_behind_the_planner_makes_no_calls() -> None:
    """Nobody would know how they are divided: it was a KeyError while lowering."""
    program = programs.captured(toys.Mlp(), torch.randn(3, 7, 12))
    passes = [AddNegations()]
    planned = plan_program(canonical(program.captured, 2, passes), PRESETS["cpu"], lambda *_: {})
    with pytest.raises(TpCompileError, match=r"add-negations adds a call of aten\.neg\.default"):
        rewrite(planned, training=False, extra=passes)


@pytest.mark.parametrize("sequence", [False, True])
def test_with_logs_every_pass_is_proved(
    sequence: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """From the first on that leaves nothing to be chosen: a fault is told by the pass that made it."""
    proved = list[str]()
    right = pipeline.verify_placements

    def proving(program: GlobalProgram, *, training: bool, after: str = "") -> Any:
        proved.append(after)
        return right(program, training=training, after=after)

    monkeypatch.setattr(pipeline, "verify_placements", proving)
    monkeypatch.setenv("TPCOMPILE_LOGS", str(tmp_path))
    program = programs.captured(toys.Blocks(), torch.randn(3, 4, 12))
    planned = plan_program(canonical(program.captured, 2), PRESETS["cpu"], lambda *_: {})
    rewrite(planned, training=True, sequence=sequence)
    divided = ["divide-sequence"] if sequence else []
    assert proved == ["choose-collectives", *divided, "coalesce-collectives", "merge-matmuls"]

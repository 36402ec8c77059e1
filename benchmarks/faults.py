"""Faults put into programs one at a time, and who catches them: the proof, ranks that compare, or verify.

    python -m benchmarks.faults [--models "mlp;packed;..."] [--most PLACES] [--kinds TEXT] [--out FILE]
    python -m benchmarks.faults --report FILE...

A fault is put into the rewritten graph, into the lowered graph of one rank, into what a rank holds of a
weight, into a rule, or into what capture gives; at so many places per kind and model. What nobody refuses is
run on all simulated ranks and compared with the model's python, results and gradients: a fault that changes
no number has made an equivalent program. A line per kind: how many faults, and how many were caught by the
proof of placements, while lowering (local shapes), by the comparison of what ranks send, and by running them
as ``tpcompile.verify`` does; how many changed no number; and how many did, and nobody has noticed. ``--out``
keeps what became of each, one JSON object a line; ``--report`` makes the tables of docs/verify.md of it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.fx import GraphModule

from benchmarks.fault_subjects import F64, LENGTH, MODELS, KeptCompiler
from benchmarks.report_faults import Outcome, read, report, table_of
from tests.helpers import families
from tests.helpers.capture_faults import CAPTURES, MODULES
from tests.helpers.faults import FAULTS
from tests.helpers.local_faults import ONE_RANK, RULES, SLICES
from tests.helpers.odd_faults import LAYERS, ODD, PROGRAMS, RANKS
from tests.helpers.value_faults import LOCAL, VALUES
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import bind_call
from tpcompile.ir.markers import origin
from tpcompile.ir.nodes import is_tensor, producer
from tpcompile.lowering.simulate import lower_all, sent
from tpcompile.passes.verify_placements import verify_placements
from tpcompile.pipeline import follow, rewrite
from tpcompile.planner.decisions import decisions_to_data
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.ranks.compare_sent import refuse_unlike
from tpcompile.rules import table
from tpcompile.runtime.read_request import read_options
from tpcompile.runtime.verify.inputs import Inputs
from tpcompile.runtime.verify.outcome import Key, compared
from tpcompile.runtime.verify.trial import Trial

SAME, EXACT = 1e-9, 1e-10
Mutant = tuple[str, Callable[[], str]]
"""The kind of a fault, and what puts it in and says what becomes of it."""


class Bench:
    """A model with its right program, and the mutants of it."""

    def __init__(self, name: str) -> None:
        self.subject = MODELS[name]
        torch.manual_seed(0)
        self.model = self.subject.build().to(F64).eval()
        if self.subject.shapes:
            self.bound = bind_call(self.model, [torch.randn(s, dtype=F64) for s in self.subject.shapes], {})
        else:
            self.bound = bind_call(self.model, (), families.inputs(name.partition(",")[0], 2, LENGTH, F64))
        self.compiler = self._compiler()
        self.trial = self._trial()
        self.want = self.trial.python()
        self.right = self.trial.programs
        self.groups = list(self.trial.compiled.planned.split_groups)
        self.data = decisions_to_data(self.trial.compiled.planned)
        self.base = self.compiler.canonical(self.model, self.bound)
        self.numbers, self.layout = self.trial.on_ranks(), self.trial.layout
        self.said = ""
        """What a fault was refused with."""
        assert self.trial.limit <= EXACT, f"{name} computes in {self.trial.limit}"
        assert self.outcome(lambda: self.right) == "equal", f"{name} is not right as it is"

    def _compiler(self) -> KeptCompiler:
        asked = ("auto", None, "cpu", bool(self.subject.shapes), None, ())
        options = read_options(self.model, *asked, sequence_parallel=self.subject.sequence)
        return KeptCompiler(options, self.subject.ranks)

    def _trial(self) -> Trial:
        return Trial(self.model, self.bound, self.compiler, True)

    def outcome(self, programs: Callable[[], list[GraphModule]]) -> str:
        """What becomes of programs of all ranks."""
        self.said = ""
        try:
            self.trial.programs = programs()
        except Exception as error:  # a fault may make anything fail; it does not come to a number
            return self._refused(error)
        try:
            refuse_unlike(sent(self.trial.rewritten.axis_sizes, self.trial.programs))
        except TpCompileError:
            return "ranks"
        try:
            numbers = self.trial.on_ranks()
            found = self.trial.compare_ranks(self.want, numbers)
        except Exception as error:
            self._refused(error)
            return "verify"
        if any(not f.error <= self.trial.limit for f in found):
            return "verify"
        pairs = zip(self.numbers, numbers, strict=True)
        return "equal" if all(self._error(right, got) <= SAME for right, got in pairs) else "missed"

    def _error(self, right: dict[Key, Any], numbers: dict[Key, Any]) -> float:
        """How far a rank is from the right program; another plan may give it other parts of weights."""
        held, now = self.layout.params, self.trial.layout.params
        alike = {(sort, n): value for (sort, n), value in right.items() if held.get(n) == now.get(n)}
        return max((one.error for one in compared(numbers, alike)), default=0.0)

    def _refused(self, error: Exception) -> str:
        self.said = f"{type(error).__name__}: {error}"
        return "proof" if "cannot be proved" in self.said else "lowering"

    def mutants(self, most: int) -> Iterator[Mutant]:
        """All faults, at some places each."""
        rewritten, last = self._rewritten(), self.right[-1]
        for kind, at, fault in _places({**FAULTS, **VALUES, **ODD}, rewritten, most):
            yield (
                f"graph: {kind}",
                functools.partial(self.outcome, lambda f=fault, at=at: self._in_graph(f, at)),
            )
        for kind, at, fault in _places({**ONE_RANK, **LOCAL, **RANKS}, last, most):
            for where, count in (("one rank", 1), ("every rank", len(self.right))):
                made = functools.partial(self._on_ranks, fault, at, count)
                yield f"{where}: {kind}", functools.partial(self.outcome, made)
        for kind, change in PROGRAMS.items():
            yield kind, functools.partial(self.outcome, lambda change=change: change(self.right))
        params = {n: p for n, p in self.trial.layout.params.items() if not p.is_whole}
        for kind, cut in SLICES.items():
            names = [n for n, p in params.items() if len(p.segments) > 1 or "segments" not in kind]
            for at in _some(len(names), most):
                yield kind, functools.partial(self._in_slices, cut, names[at])
        yield from self._before_planning(most)

    def _before_planning(self, most: int) -> Iterator[Mutant]:
        """Faults of rules, of capture and of repeated layers: the program is compiled anew."""
        called = {str(n.target).rpartition(".")[0] for n in self.base.graph.nodes if n.op == "call_function"}
        for kind, rows in RULES.items():
            if called & rows.keys():
                yield kind, functools.partial(self._again, patch.object(table, "_USER", rows))
        assert self.compiler.kept is not None
        for kind, at, fault in _places(CAPTURES, GlobalProgram(self.compiler.kept, 1), most):
            yield kind, functools.partial(self._again, self._in_capture(fault, at))
        for kind, at, fault in _places(MODULES, self.model, most):
            yield kind, functools.partial(self._of_another, fault, at)
        for kind, patched in LAYERS.items():
            if self.base.blocks is not None:
                yield kind, functools.partial(self._again, patched())

    def _rewritten(self) -> GlobalProgram:
        program = follow(self.base, (self.groups, self.data))
        rewrite(program, training=True, sequence=self.subject.sequence)
        return program

    def _in_graph(self, fault: Any, at: int) -> list[GraphModule]:
        program = self._rewritten()
        list(fault(program))[at]()
        verify_placements(program, training=True)
        _admit(program)
        return lower_all(program)

    def _on_ranks(self, fault: Any, at: int, count: int) -> list[GraphModule]:
        """The programs of all ranks, with a fault in the last ones."""
        programs = list(self.right)
        for rank in range(len(programs) - count, len(programs)):
            graph, moved = torch.fx.Graph(), dict[torch.fx.Node, torch.fx.Node]()
            graph.output(graph.graph_copy(programs[rank].graph, moved))
            programs[rank] = GraphModule(nn.Module(), graph)
            list(fault(programs[rank]))[at]()
        return programs

    def _in_slices(self, fault: Any, name: str) -> str:
        right = Inputs._value

        def value(inputs: Inputs, kind: str, wanted: str) -> Any:
            found = right(inputs, kind, wanted)
            last = inputs.layout.ranks > 1 and inputs.rank == inputs.layout.ranks - 1
            return fault(inputs, name, found) if kind == "param" and wanted == name and last else found

        with patch.object(Inputs, "_value", value):
            return self.outcome(lambda: self.right)

    @contextlib.contextmanager
    def _in_capture(self, fault: Any, at: int) -> Iterator[None]:
        self.compiler.fault = lambda program: list(fault(program))[at]()
        try:
            yield
        finally:
            self.compiler.fault = None

    def _of_another(self, fault: Any, at: int) -> str:
        """The outcome of a program that was captured of a model with a fault."""
        model, right = copy.deepcopy(self.model), self.compiler
        list(fault(model))[at]()
        self.compiler = self._compiler()
        try:
            self.compiler.capture_call(model, self.bound)
            return self._again(contextlib.nullcontext())
        finally:
            self.compiler = right

    def _again(self, faulty: AbstractContextManager[Any]) -> str:
        """The outcome of a program that is compiled anew, with a fault."""
        before = self.trial
        with faulty:
            try:
                trial = self._trial()
            except Exception as error:
                return self._refused(error)
            trial.limit, self.trial = before.limit, trial
            try:
                return self.outcome(lambda: trial.programs)
            finally:
                self.trial = before


def _admit(program: GlobalProgram) -> None:
    """Has lowering take calls that the planner has not seen, for verify to see; else they are refused."""
    factors = program.planned_factors
    assert factors is not None
    for node in program.graph.nodes:
        called = node.op == "call_function" and is_tensor(node) and node.all_input_nodes
        if called and origin(node) is node and (node, 0) not in factors._dims:
            factors._dims[node, 0] = factors._dims[producer(origin(node.all_input_nodes[0]))]


def _places(faults: dict[str, Any], program: Any, most: int) -> Iterator[tuple[str, int, Any]]:
    """Every kind of fault, at some of the places where it can be put."""
    for kind, fault in faults.items():
        for at in _some(sum(1 for _ in fault(program)), most):
            yield kind, at, fault


def _some(count: int, most: int) -> list[int]:
    """Places that are spread over all there are."""
    return [at * count // most for at in range(most)] if count > most else list(range(count))


def main() -> None:
    """Prints the tables, or the report of earlier runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=";".join(MODELS))
    parser.add_argument("--most", type=int, default=3)
    parser.add_argument("--kinds", default="")
    parser.add_argument("--out", help="a file to add outcomes to; faults that it has already are left out")
    parser.add_argument("--report", nargs="+", metavar="FILE", help="print a report of such files")
    given = parser.parse_args()
    if given.report:
        print(report(given.report))
        return
    found = []
    for name in given.models.split(";"):
        found += list(outcomes(name, given.most, given.kinds, given.out))
        print(f"{name}\n{table_of(o for o in found if o['model'] == name)}\n", flush=True)
    print(f"all models\n{table_of(found)}")


def outcomes(name: str, most: int, kinds: str, out: str | None = None) -> Iterator[Outcome]:
    """The outcomes of the mutants of one model, those that a file has already left out."""
    seen = {(o["model"], o["number"], o["most"]) for o in read([out])} if out and Path(out).exists() else ()
    bench = Bench(name)
    for at, (kind, run) in enumerate(bench.mutants(most)):
        if kinds not in kind or (name, at, most) in seen:
            continue
        found: Outcome = {"model": name, "kind": kind, "outcome": run(), "number": at, "most": most}
        found["said"] = bench.said
        if found["outcome"] == "missed":
            print(f"missed in {name}: number {at}, {kind}", flush=True)
        if out:
            with Path(out).open("a") as file:
                print(json.dumps(found), file=file)
        yield found


if __name__ == "__main__":
    main()

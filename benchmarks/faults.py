"""Faults put into programs one at a time, and who catches them: the proof, ranks that compare, or verify.

    python -m benchmarks.faults [--models mlp,packed,...] [--most PLACES] [--kinds TEXT]

A fault is put into the rewritten graph, into the lowered graph of one rank, into what a rank holds of a
weight, into a rule, or into what capture gives; at so many places per kind and model. What nobody refuses is
run on all simulated ranks and compared with the model's python, results and gradients: a fault that changes
no number has made an equivalent program. A line per kind: how many faults, and how many were caught by the
proof of placements, while lowering (local shapes), by the comparison of what ranks send, and by running them
as ``tpcompile.verify`` does; how many changed no number; and how many did, and nobody has noticed.
"""

from __future__ import annotations

import argparse
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.fx import GraphModule

from tests.helpers import families, toys
from tests.helpers.capture_faults import CAPTURES
from tests.helpers.faults import FAULTS
from tests.helpers.local_faults import ONE_RANK, RULES, SLICES
from tests.helpers.value_faults import LOCAL, VALUES
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import bind_call
from tpcompile.lowering.simulate import lower_all, sent
from tpcompile.passes.verify_placements import verify_placements
from tpcompile.pipeline import follow, rewrite
from tpcompile.planner.decisions import decisions_to_data
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.ranks.compare_sent import refuse_unlike
from tpcompile.rules import table
from tpcompile.runtime.read_request import read_options
from tpcompile.runtime.verify.compare import difference
from tpcompile.runtime.verify.inputs import Inputs
from tpcompile.runtime.verify.trial import SimulatedCompiler, Trial

OUTCOMES = ("proof", "lowering", "ranks", "verify", "equal", "missed")
SAME = 1e-9
F64 = torch.float64
Mutant = tuple[str, Callable[[], str]]
"""The kind of a fault, and what puts it in and says what becomes of it."""


@dataclass(frozen=True)
class Subject:
    """A model to put faults into.

    Attributes:
        build: makes it.
        shapes: of its arguments; none for a family of ``tests/helpers/families.py``.
        ranks: on how many ranks.
        sequence: with sequence parallelism.
    """

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...] = ()
    ranks: int = 2
    sequence: bool = False


def _family(name: str, sequence: bool = False) -> Subject:
    return Subject(lambda: families.build(name, F64), sequence=sequence)


def _encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(12, 4, 20, dropout=0.0, batch_first=True)


MODELS = {
    "mlp": Subject(toys.Mlp, ((3, 4, 12),)),
    "attention": Subject(lambda: toys.Attention(False), ((3, 4, 20),)),
    "packed": Subject(lambda: toys.Attention(True), ((3, 4, 20),)),
    "gqa below the ranks": Subject(lambda: toys.NormedHeads(heads=8, groups=2), ((3, 4, 20),), 4),
    "parallel block": Subject(toys.Parallel, ((3, 4, 20),)),
    "sequence parallel": Subject(toys.Blocks, ((3, 4, 12),), 2, True),
    "encoder": Subject(_encoder, ((3, 4, 12),)),
    "convnet": Subject(toys.NormedConvolution, ((3, 6, 12),)),
    **{name: _family(name) for name in ("llama", "mixtral", "deepseek_v3", "cohere", "mamba")},
    "llama, sequence parallel": _family("llama", True),
}


class Bench:
    """A model with its right program, and the mutants of it."""

    def __init__(self, name: str) -> None:
        self.subject = MODELS[name]
        torch.manual_seed(0)
        self.model = self.subject.build().to(F64).eval()
        if self.subject.shapes:
            self.bound = bind_call(self.model, [torch.randn(s, dtype=F64) for s in self.subject.shapes], {})
        else:
            self.bound = bind_call(self.model, (), families.inputs(name.partition(",")[0], 2, 7, F64))
        self.trial = self._trial()
        self.want = self.trial.python()
        self.right = self.trial.programs
        self.groups = list(self.trial.compiled.planned.split_groups)
        self.data = decisions_to_data(self.trial.compiled.planned)
        self.base = self.trial.compiler.canonical(self.model, self.bound)
        self.numbers = self.trial.on_ranks()
        assert self.outcome(lambda: self.right) == "equal", f"{name} is not right as it is"

    def _trial(self) -> Trial:
        asked = ("auto", None, "cpu", True, None, ())
        options = read_options(self.model, *asked, sequence_parallel=self.subject.sequence)
        return Trial(self.model, self.bound, SimulatedCompiler(options, self.subject.ranks), True)

    def outcome(self, programs: Callable[[], list[GraphModule]]) -> str:
        """What becomes of programs of all ranks."""
        try:
            self.trial.programs = programs()
        except TpCompileError as error:
            return "proof" if "cannot be proved" in str(error) else "lowering"
        except Exception:  # a fault may make anything fail; it does not come to a number
            return "lowering"
        try:
            refuse_unlike(sent(self.trial.rewritten.axis_sizes, self.trial.programs))
        except TpCompileError:
            return "ranks"
        try:
            numbers = self.trial.on_ranks()
            found = self.trial.compare_ranks(self.want, numbers)
        except Exception:
            return "verify"
        if any(not f.error <= self.trial.limit for f in found):
            return "verify"
        pairs = zip(self.numbers, numbers, strict=True)
        errors = [_error(got.get(key), want) for right, got in pairs for key, want in right.items()]
        return "equal" if all(error <= SAME for error in errors) else "missed"

    def mutants(self, most: int) -> Iterator[Mutant]:
        """All faults, at some places each."""
        rewritten = self._rewritten()
        for kind, fault in {**FAULTS, **VALUES}.items():
            for at in _some(sum(1 for _ in fault(rewritten)), most):
                yield (
                    f"graph: {kind}",
                    lambda fault=fault, at=at: self.outcome(lambda: self._in_graph(fault, at)),
                )
        for kind, local in {**ONE_RANK, **LOCAL}.items():
            for at in _some(sum(1 for _ in local(self.right[-1])), most):
                for where, count in (("one rank", 1), ("every rank", len(self.right))):
                    made = functools.partial(self._on_ranks, local, at, count)
                    yield f"{where}: {kind}", lambda made=made: self.outcome(made)
        params = {n: p for n, p in self.trial.layout.params.items() if not p.is_whole}
        for kind, cut in SLICES.items():
            names = [n for n, p in params.items() if len(p.segments) > 1 or "segments" not in kind]
            for at in _some(len(names), most):
                yield kind, lambda cut=cut, name=names[at]: self._in_slices(cut, name)
        for kind, rows in RULES.items():
            called = {
                str(n.target).rpartition(".")[0] for n in self.base.graph.nodes if n.op == "call_function"
            }
            if called & rows.keys():
                yield kind, lambda rows=rows: self._by_a_rule(rows)
        for kind, change in CAPTURES.items():
            for at in _some(sum(1 for _ in change(self.base.copy())), most):
                yield kind, lambda change=change, at=at: self._in_capture(change, at)

    def _rewritten(self) -> GlobalProgram:
        program = follow(self.base, (self.groups, self.data))
        rewrite(program, training=True, sequence=self.subject.sequence)
        return program

    def _in_graph(self, fault: Any, at: int) -> list[GraphModule]:
        program = self._rewritten()
        list(fault(program))[at]()
        verify_placements(program, training=True)
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

    def _by_a_rule(self, rows: dict[str, str]) -> str:
        with patch.object(table, "_USER", rows):
            return self._again()

    def _in_capture(self, change: Any, at: int) -> str:
        right = SimulatedCompiler.capture_call

        def capture(compiler: Any, model: nn.Module, bound: dict[str, Any]) -> Any:
            captured = right(compiler, model, bound)
            list(change(GlobalProgram(captured, 1)))[at]()
            return captured

        with patch.object(SimulatedCompiler, "capture_call", capture):
            return self._again()

    def _again(self) -> str:
        """The outcome of a program that is compiled anew."""
        before = self.trial
        try:
            trial = self._trial()
        except Exception as error:
            return "proof" if "cannot be proved" in str(error) else "lowering"
        trial.limit, self.trial = before.limit, trial
        try:
            return self.outcome(lambda: trial.programs)
        finally:
            self.trial = before


def _error(got: Any, want: Any) -> float:
    """How far a rank's value is from that of the right programs; another plan may give it another part."""
    shapes = [getattr(value, "shape", ()) for value in (got, want)]
    return difference(got, want) if shapes[0] == shapes[1] else 0.0


def _some(count: int, most: int) -> list[int]:
    """Places that are spread over all there are."""
    return [at * count // most for at in range(most)] if count > most else list(range(count))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--most", type=int, default=3)
    parser.add_argument("--kinds", default="")
    given = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    for name in given.models.split(","):
        bench = Bench(name)
        for kind, run in bench.mutants(given.most):
            if given.kinds in kind:
                counts[kind, run()] += 1
        print(f"{name}: {sum(counts.values())} faults so far\n{table_of(counts)}\n", flush=True)


def table_of(counts: Counter[tuple[str, str]]) -> str:
    """A line per kind of fault."""
    kinds = list(dict.fromkeys(kind for kind, _ in counts))
    width = max(map(len, kinds))
    lines = [f"{'fault':{width}}  mutants  " + "  ".join(f"{outcome:>8}" for outcome in OUTCOMES)]
    for kind in [*kinds, "all"]:
        row = [
            sum(n for (k, o), n in counts.items() if kind in (k, "all") and o == each) for each in OUTCOMES
        ]
        lines.append(f"{kind:{width}}  {sum(row):7}  " + "  ".join(f"{n:8}" for n in row))
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Faults put into programs one at a time, and who catches them: the proof, ranks that compare, or verify.

    python -m benchmarks.faults [--models mlp,packed,...] [--most PLACES] [--kinds TEXT]

A fault is put into the rewritten graph, into the lowered graph of one rank, into what a rank holds of a
weight, into a rule, or into what capture gives; at so many places per kind and model. What nobody refuses is
run on all simulated ranks and compared with the model's python, results and gradients: a fault that changes
no number has made an equivalent program. A line per kind: how many faults, and how many were caught by the
proof of placements, while lowering (local shapes), by the comparison of what ranks send, and by running them
as ``tpcompile.verify`` does; and how many changed nothing.
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
from tests.helpers.faults import FAULTS
from tests.helpers.local_faults import ONE_RANK, RULES, SLICES
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import bind_call
from tpcompile.lowering.simulate import lower_all, sent
from tpcompile.passes.verify_placements import verify_placements
from tpcompile.pipeline import follow, rewrite
from tpcompile.planner.decisions import decisions_to_data
from tpcompile.planner.work import Work
from tpcompile.ranks.compare_sent import refuse_unlike
from tpcompile.rules import table
from tpcompile.runtime.read_request import read_options
from tpcompile.runtime.verify.inputs import Inputs
from tpcompile.runtime.verify.trial import SimulatedCompiler, Trial

OUTCOMES = ("proof", "lowering", "ranks", "verify", "equal")
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


def _family(name: str, ranks: int = 2, sequence: bool = False) -> Subject:
    return Subject(lambda: families.build(name, F64), (), ranks, sequence)


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
    "llama, sequence parallel": _family("llama", 2, True),
}


class Bench:
    """A model with its right program, and the mutants of it."""

    def __init__(self, name: str) -> None:
        self.name, self.subject = name, MODELS[name]
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
        self.base = self.trial.compiler.capture(self.model, self.bound)
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
            refuse_unlike(sent(self.trial.work.axes, self.trial.programs))
        except TpCompileError:
            return "ranks"
        try:
            found = self.trial.compare_ranks(self.want, self.trial.on_ranks())
        except Exception:
            return "verify"
        return "verify" if any(not f.error <= self.trial.limit for f in found) else "equal"

    def mutants(self, most: int) -> Iterator[Mutant]:
        """All faults, at some places each."""
        for kind, fault in FAULTS.items():
            for at in _some(sum(1 for _ in fault(self._rewritten())), most):
                yield (
                    f"graph: {kind}",
                    lambda fault=fault, at=at: self.outcome(lambda: self._in_graph(fault, at)),
                )
        for kind, local in ONE_RANK.items():
            for at in _some(sum(1 for _ in local(self.right[-1])), most):
                made = functools.partial(self._on_one_rank, local, at)
                yield kind, lambda made=made: self.outcome(made)
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

    def _rewritten(self) -> Work:
        work = follow(self.base, (self.groups, self.data))
        rewrite(work, training=True, sequence=self.subject.sequence)
        return work

    def _in_graph(self, fault: Any, at: int) -> list[GraphModule]:
        work = self._rewritten()
        list(fault(work))[at]()
        verify_placements(work, training=True)
        return lower_all(work)

    def _on_one_rank(self, fault: Any, at: int) -> list[GraphModule]:
        graph, moved = torch.fx.Graph(), dict[torch.fx.Node, torch.fx.Node]()
        graph.output(graph.graph_copy(self.right[-1].graph, moved))
        program = GraphModule(nn.Module(), graph)
        list(fault(program))[at]()
        return [*self.right[:-1], program]

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
            list(change(Work(captured, 1)))[at]()
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
        self.trial = trial
        try:
            return self.outcome(lambda: trial.programs)
        finally:
            self.trial = before


def _some(count: int, most: int) -> list[int]:
    """Places that are spread over all there are."""
    return sorted(
        {at * count // most for at in range(min(most, count))} if count > most else set(range(count))
    )


def _left_out(work: Work) -> Iterator[Callable[[], Any]]:
    """A call that leaves shape and type as they are is not there."""
    for node in work.graph.nodes:
        first = next(iter(node.all_input_nodes), None) if node.op == "call_function" else None
        if first is not None and isinstance(val := node.meta.get("val"), torch.Tensor) and node.users:
            other = first.meta.get("val")
            if isinstance(other, torch.Tensor) and other.shape == val.shape and other.dtype == val.dtype:
                yield lambda node=node, first=first: node.replace_all_uses_with(first)


def _stopped(work: Work) -> Iterator[Callable[[], Any]]:
    """No gradient flows through a call: as if its backward were lost."""
    for node in work.graph.nodes:
        val = node.meta.get("val")
        if node.op == "call_function" and isinstance(val, torch.Tensor) and val.is_floating_point():
            yield lambda node=node: _detach(node)


def _detach(node: torch.fx.Node) -> None:
    with node.graph.inserting_after(node):
        cut = node.graph.call_function(torch.ops.aten.detach.default, (node,))
    cut.meta.update(node.meta)
    node.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut)


CAPTURES = {"capture: a call left out": _left_out, "capture: a gradient stops": _stopped}


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

"""A call of a model in one precision: as python, as a graph at global shapes, and on all simulated ranks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tpcompile.capture.export.captured import Captured
from tpcompile.capture.export.kept_calls import FUNCTION
from tpcompile.capture.held_caches import Held
from tpcompile.capture.repeats.unroll_layers import unroll
from tpcompile.compile_program import Compiler
from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import flatten_call
from tpcompile.ir.graph_edit import copied
from tpcompile.ir.nodes import module_path
from tpcompile.lowering.lower_graph import Lowered, copy_placeholder
from tpcompile.lowering.lower_randomness import UNIFORM
from tpcompile.lowering.simulate import Watch, lower_all, run, sent
from tpcompile.lowering.state import SOURCE, STANDS_FOR
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.planner.options import Options
from tpcompile.ranks.compare_sent import refuse_unlike
from tpcompile.runtime.make_program import hand_out

from .assemble import RanksDiffer, Unknown, put_together, sizes_at
from .compare import TypesSeen, difference, kinds_of, limit_of
from .in_double import in_double
from .inputs import Inputs, undivided
from .outcome import Finding, Key, backward, compared, learning_leaves, results_of, run_python, worst_of

Lower = Callable[[GlobalProgram], Sequence[GraphModule]]


class SimulatedCompiler(Compiler):
    """Compiles for all ranks in this process.

    Args:
        options: what the user asked for.
        ranks: how many ranks.
        lower: makes the programs of all ranks.
        exact: the model's python computes in double precision, where it says otherwise too.

    Attributes:
        programs: the programs that were made last.
        kinds: the types in what was captured last, before any pass, which may put a cast there.
    """

    def __init__(
        self, options: Options, ranks: int, lower: Lower = lower_all, *, exact: bool = False
    ) -> None:
        super().__init__(options, ranks)
        self._lower_all, self.programs, self.exact = lower, list[GraphModule](), exact
        self.kinds = set[torch.dtype]()

    def python(self) -> AbstractContextManager[None]:
        """Where the model's python runs."""
        return in_double() if self.exact else nullcontext()

    def capture_call(self, model: nn.Module, bound: dict[str, Any]) -> Captured:
        """A call as it is captured."""
        with self.python():
            captured = super().capture_call(model, bound)
        self.kinds = kinds_of([node.meta.get("val") for node in captured.graph_module.graph.nodes])
        return captured

    def lower(self, rewritten: GlobalProgram) -> Lowered:
        """Lowers for every rank: what does not run on some rank's part is planned again."""
        self.programs = list(self._lower_all(rewritten))
        refuse_unlike(sent(rewritten.axis_sizes, self.programs))
        return super().lower(rewritten)


class Trial:
    """One call, ready to run in three ways.

    Attributes:
        model: with whole weights, as it is captured.
        bound: the call.
        compiler: compiles it for some ranks.
        compiled: the program.
        programs: those of all ranks.
        asked: gradients are asked for, and
        learning: compared as well.
        limit: the largest error that rounding explains, in the types that the model's python has used, and
            unless it is exact, the captured graph: python that is traced may go another way (a table that
            transformers interpolates in float32 only while it is traced).
    """

    def __init__(
        self, model: nn.Module, bound: dict[str, Any], compiler: SimulatedCompiler, gradients: bool
    ) -> None:
        self.model, self.bound, self.compiler = model, bound, compiler
        self.asked = gradients
        with torch.set_grad_enabled(gradients):
            self.compiled = compiler.compile(model, bound, None)
            if compiler.exact and self.compiled.rewritten.captured.functions:
                # Their python runs inside of programs, where nothing widens it: nor may it be outside.
                compiler.exact = False
                self.compiled = compiler.compile(model, bound, None)
        self.rewritten, self.layout = self.compiled.rewritten, self.compiled.plan.layout
        _refuse_randomness(self.rewritten)
        self.programs = compiler.programs
        self.learning = gradients and self.compiled.differentiable
        specs = self.specs = self.rewritten.captured.whole_outputs
        self.losses = frozenset(s.name for s in specs if s.kind == "user" and not s.divided)
        self.limit = math.nan

    def python(self) -> dict[Key, Any]:
        """What the model leaves behind as python."""
        model = copy.deepcopy(self.model)
        with TypesSeen() as seen:
            found = self.run_python(model)
        seen.kinds |= kinds_of([*model.parameters(), self.bound, list(found.values())])
        self.limit = limit_of(seen.kinds if self.compiler.exact else seen.kinds | self.compiler.kinds)
        for spec in (s for s in self.specs if s.kind == "attribute"):
            path, _, name = spec.name.rpartition(".")
            found["attribute", spec.name] = getattr(model.get_submodule(path), name, None)
        passed = {("check", s.name): torch.tensor(True) for s in self.specs if s.kind == "check"}
        found |= passed  # or it would have raised
        return found

    def run_python(self, model: nn.Module) -> dict[Key, Any]:
        """What a copy of the model, which is written to, leaves behind."""
        with self.compiler.python():
            return run_python(model, self.bound, self.learning)

    def captured(self) -> Captured:
        """The call as it was captured, before any pass."""
        with torch.set_grad_enabled(self.asked):
            return self.compiler.capture_call(self.model, self.bound)

    def whole(self, rewritten: GlobalProgram, watch: Watch | None = None) -> dict[Key, Any]:
        """What a graph at global shapes leaves behind on one rank, where markers are identities."""
        local = whole_program(rewritten)
        inputs = self._inputs(rewritten, 0, divided=False)
        with torch.set_grad_enabled(self.learning):
            (flat,) = run(rewritten, [inputs.of(local.graph)], [local], watch)
        found = self._buffers(inputs) | results_of(rewritten.captured.whole_outputs, flat)
        if self.learning:
            backward([found], self.losses)
            found |= self._gradients(inputs)
        return found

    def on_ranks(self, watch: Watch | None = None) -> list[dict[Key, Any]]:
        """What all ranks' programs leave behind, in lockstep."""
        ranks = [self._inputs(self.rewritten, r, divided=True) for r in range(self.layout.ranks)]
        feeds = [mine.of(local.graph) for mine, local in zip(ranks, self.programs, strict=True)]
        with torch.set_grad_enabled(self.learning):
            flat = run(self.rewritten, feeds, self.programs, watch)
        found = [
            self._buffers(mine) | results_of(self.specs, one) for mine, one in zip(ranks, flat, strict=True)
        ]
        if self.learning:
            backward(found, self.losses)
            found = [one | self._gradients(mine) for one, mine in zip(found, ranks, strict=True)]
        return found

    def _inputs(self, rewritten: GlobalProgram, rank: int, divided: bool) -> Inputs:
        leaves, learned = flatten_call(self.bound)[0], learning_leaves(self.bound)
        layout = self.layout if divided else undivided(rewritten, self.model)
        return Inputs(self.model, rewritten.captured, leaves, layout, rank, self.learning, learned)

    def _buffers(self, inputs: Inputs) -> dict[Key, Any]:
        """Every buffer as it was: what the program leaves alone stays so."""
        return {
            ("buffer", name): inputs.layout.shard(name, value, inputs.rank)
            for name, value in self.model.named_buffers()
        }

    @staticmethod
    def _gradients(inputs: Inputs) -> dict[Key, Any]:
        learned = {name for (_, name), v in inputs.given.items() if getattr(v, "requires_grad", False)}
        grads = {name: grad for (_, name), grad in inputs.gradients().items()}
        return {("gradient", name): grads.get(name) for name in sorted(learned)}

    def compare_ranks(self, want: Mapping[Key, Any], ranks: Sequence[Mapping[Key, Any]]) -> list[Finding]:
        """What all ranks leave behind, compared with what the whole model does."""
        carried = {("result", spec.name) for spec in self.specs if spec.divided}
        held, found = hand_out(self.compiled.planned), []
        for key, value in want.items():
            if key in carried and isinstance(value, Tensor) and key[1] in held:
                found.append(self._cache(key[1], value, [mine[key] for mine in ranks], held[key[1]]))
        plain = {key: value for key, value in want.items() if key not in carried}
        columns = [
            compared(mine, {key: self.part(key, value, rank) for key, value in plain.items()})
            for rank, mine in enumerate(ranks)
        ]
        return found + worst_of(columns, self.limit)

    def compare(self, want: Mapping[Key, Any], got: Mapping[Key, Any]) -> list[Finding]:
        """What a graph at global shapes leaves behind, compared with what the model does."""
        return compared(got, want)

    def part(self, key: Key, whole: Any, rank: int) -> Any:
        """What a rank should have of a value."""
        sort, name = key
        if sort in ("buffer", "gradient") and name in self.layout.params and isinstance(whole, Tensor):
            return self.layout.shard(name, whole, rank)
        return whole

    def _cache(self, name: str, whole: Tensor, parts: Sequence[Tensor], held: Held) -> Finding:
        """A tensor of a cache, put together from what the ranks hand out."""
        try:
            sizes = sizes_at(whole, held.atoms)
            error = difference(
                put_together(parts, sizes, self.layout.axis_sizes, held.placed, self.limit), whole
            )
        except (RanksDiffer, Unknown):
            error = math.inf
        return Finding("result", name, error, 0 if error <= self.limit else len(parts))


def whole_program(rewritten: GlobalProgram) -> GraphModule:
    """A graph at global shapes with all layers, which says where its inputs come from."""
    graph, moved = copied(rewritten.graph)
    for old, new in moved.items():
        new.meta[STANDS_FOR] = ((old.name, old.meta.get("placement")),)
        if old in rewritten.sources:
            new.meta[SOURCE] = rewritten.sources[old]
        if new.target is FUNCTION:
            key = new.args[2]
            new.args = (*new.args[:2], rewritten.captured.functions[key].handle, *new.args[3:])  # type: ignore[index]
        if new.target is torch.ops.aten.copy.default:
            new.target = _copied
    if rewritten.blocks is not None:
        unroll(graph, rewritten.blocks, copy_placeholder)
    return GraphModule(nn.Module(), graph)


def _copied(into: Tensor, source: Tensor) -> Tensor:
    """``aten.copy``, which is in graphs before any pass, and has no derivative."""
    return source.expand_as(into).to(into, copy=True)


def _refuse_randomness(rewritten: GlobalProgram) -> None:
    draws = rewritten.graph.find_nodes(op="call_function", target=UNIFORM)
    if draws:
        raise TpCompileError(
            "the model draws random numbers, and those of a sharded model are not torch's own",
            where=module_path(draws[0]) or draws[0].name,
            todo="verify it in model.eval()",
        )

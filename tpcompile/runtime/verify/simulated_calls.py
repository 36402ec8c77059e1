"""A model whose calls are run by all simulated ranks, so that it generates in one process."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tpcompile.capture.caches.layers import with_counts
from tpcompile.capture.export.captured import Captured
from tpcompile.capture.export.look_inside import first_unlike, without_values
from tpcompile.capture.export.specs import OutputSpec
from tpcompile.capture.held_caches import Held
from tpcompile.ir.calls import flatten_call, signature_of
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.module_tensors import named_tensor
from tpcompile.lowering.simulate import run
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.runtime.make_program import hand_out, open_leaves, whole_captured

from .assemble import RanksDiffer, put_together, sizes_at
from .compare import agree, limit_of
from .inputs import Inputs
from .trial import SimulatedCompiler


@dataclass
class _Program:
    """One call signature.

    Attributes:
        rewritten: the rewritten program.
        ranks: every rank's graph.
        captured: the whole call.
        names: the arguments that are given.
        example: the leaves of the call that it was captured for.
        limit: how far results of ranks may be from each other.
    """

    rewritten: GlobalProgram
    ranks: list[GraphModule]
    captured: Captured
    names: tuple[str, ...]
    example: tuple[Any, ...]
    limit: float

    def fits(self, names: tuple[str, ...], leaves: Sequence[Any], spec: Any) -> bool:
        """Whether a call is one of this program's."""
        if names != self.names or spec != self.captured.in_spec or len(leaves) != len(self.example):
            return False
        if first_unlike(leaves, self.example, ()) is not None:
            return False
        return self.captured.accepts(with_counts(leaves, open_leaves(leaves, self.captured))) is None


class SimulatedCalls:
    """Calls of a model; its caches are whole between them, and cut for the ranks in each.

    Args:
        model: the model, which is written to.
        compiler: compiles its calls for some ranks.
    """

    def __init__(self, model: nn.Module, compiler: SimulatedCompiler) -> None:
        self.model, self.compiler = model, compiler
        self.layout: WeightLayout | None = None
        self.caches: dict[str, Held] = {}
        self.programs: list[_Program] = []

    def call(self, bound: dict[str, Any]) -> Any:
        """Runs a call.

        Raises:
            RanksDiffer: ranks compute different results.
        """
        leaves, spec = flatten_call(bound)
        fitting = [p for p in self.programs if p.fits(tuple(bound), leaves, spec)]
        program = fitting[0] if fitting else self._compile(bound, leaves)
        flat = self._run(program, leaves)
        for write in program.captured.writes:
            write.write(self.model, flat)
        return program.captured.unflatten(flat, bound)

    def _compile(self, bound: dict[str, Any], leaves: Sequence[Any]) -> _Program:
        compiled = self.compiler.compile(self.model, bound, self.layout, self.caches)
        self.layout = compiled.plan.layout
        self.caches = {**hand_out(compiled.planned), **self.caches}
        ranks, captured = self.compiler.programs, whole_captured(compiled.planned)
        example = without_values(leaves)
        limit, rewritten = limit_of(self.compiler.kinds), compiled.rewritten
        self.programs.append(_Program(rewritten, ranks, captured, tuple(bound), example, limit))
        return self.programs[-1]

    def _run(self, program: _Program, leaves: Sequence[Any]) -> list[Any]:
        assert self.layout is not None, "a program has decided it"
        captured = program.captured
        leaves = with_counts(leaves, open_leaves(leaves, captured))
        ranks = [
            Inputs(self.model, captured, leaves, self.layout, rank, caches=self.caches)
            for rank in range(self.layout.ranks)
        ]
        feeds = [mine.of(graph.graph) for mine, graph in zip(ranks, program.ranks, strict=True)]
        with torch.no_grad():
            columns = list(zip(*run(program.rewritten, feeds, program.ranks), strict=True))
        return [
            self._whole(s, parts, program.limit) for s, parts in zip(captured.outputs, columns, strict=True)
        ]

    def _whole(self, spec: OutputSpec, parts: Sequence[Any], limit: float) -> Any:
        """A result from what all ranks have of it; a buffer gets its new value."""
        assert self.layout is not None
        if spec.kind == "buffer_mutation":
            whole = self.layout.assemble(spec.name, dict(enumerate(parts)))
            named_tensor(self.model, spec.name).copy_(whole)
            return whole
        held = self.caches.get(spec.name) if spec.divided else None
        if held is None or not isinstance(parts[0], Tensor):
            if any(not agree(part, parts[0], limit) for part in parts[1:] if isinstance(part, Tensor)):
                raise RanksDiffer(spec.name)
            return parts[0]
        sizes = sizes_at(held.whole(parts[0]), held.atoms)
        return put_together(parts, sizes, self.layout.axis_sizes, held.placed, limit)


@contextmanager
def simulated(model: nn.Module, compiler: SimulatedCompiler) -> Iterator[nn.Module]:
    """A copy of a model whose calls are run by all simulated ranks."""
    copied = copy.deepcopy(model)
    signature, original = signature_of(copied), copied.forward
    calls = SimulatedCalls(copied, compiler)

    def forward(*args: Any, **kwargs: Any) -> Any:
        del copied.__dict__["forward"]  # it is captured as it was
        try:
            return calls.call(signature.bind(args, kwargs))
        finally:
            copied.__dict__["forward"] = instead

    instead = functools.update_wrapper(forward, original)
    instead.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    copied.__dict__["forward"] = instead
    yield copied

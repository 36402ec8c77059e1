"""Compiles a call for some ranks without any: its program for the rank that holds most, with few layers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tpcompile.capture.export.captured import Captured
from tpcompile.capture.export.switch_experts import exportable_experts
from tpcompile.capture.held_caches import Held
from tpcompile.compile_program import Compiled, Compiler
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.lowering.lower_graph import Lowered, lower_program
from tpcompile.lowering.simulate import SimulatedGroups
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.planner.options import Options

from .shorten import Copies, left_out, samples, shortened

Captures = dict[Hashable, Captured]
"""What was captured: for any number of ranks the same."""


class DryCompiler(Compiler):
    """Compiles calls for the first of some ranks, which has the larger part of everything.

    Args:
        options: what the user asked for.
        ranks: how many ranks.
        accelerator: experts are computed as they are on one, not as on a CPU.
        captures: what was captured already.

    Attributes:
        programs: of the call that was compiled last: numbers of layers, and with these the rank's graphs.
    """

    def __init__(self, options: Options, ranks: int, accelerator: bool, captures: Captures) -> None:
        super().__init__(replace(options, dynamic=False), ranks)
        self._device_type = "cuda" if accelerator else "cpu"
        self._captures = captures
        self._key: Hashable = None
        self._runs = True
        self.programs: list[tuple[Copies, GlobalProgram, Lowered]] = []

    def compile_as(
        self,
        key: Hashable,
        model: nn.Module,
        bound: dict[str, Any],
        layout: WeightLayout | None,
        caches: Mapping[str, Held] | None = None,
        *,
        runs: bool = True,
    ) -> Compiled:
        """As ``compile``; what was captured under the same key is not captured again.

        Args:
            key: which call it is.
            model: see ``compile``, as for all that are not named here.
            runs: the program is to be run, not only lowered.
        """
        self._runs = runs
        self._key = (key, model.training, self._device_type)
        return self.compile(model, bound, layout, caches)

    def capture_call(self, model: nn.Module, bound: dict[str, Any]) -> Captured:
        """One call as it is captured."""
        if self._key not in self._captures:
            with exportable_experts(model, torch.device(self._device_type)):
                self._captures[self._key] = super().capture_call(model, bound)
        # A copy, because layers that are planned one by one are written into the graph.
        return GlobalProgram(self._captures[self._key], self.ranks).copy().captured

    def lower(self, rewritten: GlobalProgram) -> Lowered:
        """The first rank's graphs; what does not run on its part is planned again."""
        first = (0,) * len(rewritten.axis_sizes)
        self.programs = []
        wanted = samples(left_out(rewritten))
        for copies in wanted if self._runs else wanted[:1]:
            short = shortened(rewritten, copies)
            groups = SimulatedGroups(rewritten.axis_sizes, first)
            self.programs.append((copies, short, lower_program(short, first, groups)))
        return super().lower(rewritten)

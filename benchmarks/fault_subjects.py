"""What ``benchmarks.faults`` puts faults into: toys and tiny models of transformers, captured once each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.helpers import families, toys
from tests.helpers.odd_faults import Hooked, Repeated
from tpcompile.capture.export.captured import Captured
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.planner.options import Options
from tpcompile.runtime.verify.trial import SimulatedCompiler

F64 = torch.float64


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


FAMILIES = (
    *("llama", "mixtral", "deepseek_v3", "cohere", "mamba", "gpt2", "phi3", "gemma2", "bert", "t5"),
    *("qwen2", "falcon_mqa", "qwen2_moe", "unet"),
)
LENGTH = 3
"""Tokens of a family's call: a recurrence is unrolled over them."""

MODELS = {
    "mlp": Subject(toys.Mlp, ((3, 4, 12),)),
    "attention": Subject(lambda: toys.Attention(False), ((3, 4, 20),)),
    "packed": Subject(lambda: toys.Attention(True), ((3, 4, 20),)),
    "gqa below the ranks": Subject(lambda: toys.NormedHeads(heads=8, groups=2), ((3, 4, 20),), 4),
    "parallel block": Subject(toys.Parallel, ((3, 4, 20),)),
    "sequence parallel": Subject(toys.Blocks, ((3, 4, 12),), 2, True),
    "encoder": Subject(_encoder, ((3, 4, 12),)),
    "convnet": Subject(toys.NormedConvolution, ((3, 6, 12),)),
    "repeated layers": Subject(Repeated, ((3, 4, 12),)),
    "hooks and a backward": Subject(Hooked, ((3, 4, 12),)),
    **{name: _family(name) for name in FAMILIES},
    "llama, 8 ranks": _family("llama", 8),
    "llama, sequence parallel": _family("llama", sequence=True),
}


class KeptCompiler(SimulatedCompiler):
    """Captures once, and gives out copies, with a fault if one is to be in them."""

    def __init__(self, options: Options, ranks: int) -> None:
        super().__init__(options, ranks, exact=True)
        self.kept: Captured | None = None
        self.fault: Callable[[GlobalProgram], Any] | None = None

    def capture_call(self, model: nn.Module, bound: dict[str, Any]) -> Captured:
        if self.kept is None:
            self.kept = super().capture_call(model, bound)
        program = GlobalProgram(self.kept, 1).copy()
        if self.fault is not None:
            self.fault(program)
        return program.captured

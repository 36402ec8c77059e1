"""Shows plans and graphs in torch's structured trace (``TORCH_TRACE``), which ``tlparse`` makes pages of."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tpcompile.ir.print_graph import graph_text
from tpcompile.ir.torch_internals import trace_structured

from .program import RankProgram


def trace_program(program: RankProgram) -> None:
    """Adds a program to the trace, if there is one: its plan, its graph at global shapes, and this rank's."""
    compiled = program.compiled
    artifacts: dict[str, Callable[[], str]] = {
        "plan": lambda: f"{program}\n\n{program.plan}",
        "global_graph": lambda: graph_text(compiled.rewritten.graph),
        "rank_graph": lambda: graph_text(program.graph_module.graph),
    }
    for name, text in artifacts.items():
        about: Callable[[], dict[str, str]] = partial(dict, name=f"tpcompile_{name}", encoding="string")
        trace_structured("artifact", about, payload_fn=text, expect_trace_id=False)

"""Compiles single programs with torch.compile, each by itself.

The python around a program (finding it, taking caches apart and together) is not compiled with it: a program
that is missing is then captured without breaking a graph, and nothing but sizes can make torch compile again.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tpcompile.capture.caches.layers import is_count
from tpcompile.capture.export.captured import Captured
from tpcompile.ir.torch_internals import maybe_mark_dynamic

Step = Callable[..., Any]


def compile_step(step: Step, name: str, options: dict[str, Any]) -> Step:
    """A program's step under torch.compile.

    Args:
        step: takes the tensors of a call.
        name: tells programs apart in torch's logs.
        options: torch.compile's.
    """

    def run(given: list[Any]) -> Any:
        return step(given)

    # torch counts recompilations by code object, and tries the guards of all that was compiled for one.
    code = run.__code__.replace(co_name=name)
    own = types.FunctionType(code, run.__globals__, name, None, run.__closure__)
    compiled: Step = torch.compile(own, **options)
    return compiled


def mark_open_sizes(captured: Captured, given: Sequence[Any]) -> None:
    """Tells torch which sizes will change, so that it does not compile once for the first ones in vain.

    With a static cache only the numbers of tokens in it change from step to step: all other sizes are worth
    being compiled for, until they are seen to change.
    """
    static = any(spec.in_place for spec in captured.outputs)
    for spec, tensor in zip(captured.user_inputs, given, strict=True):
        if isinstance(tensor, Tensor) and (not static or is_count(spec.name)):
            for dim, extent in enumerate(spec.extents or ()):
                if isinstance(extent, str):
                    maybe_mark_dynamic(tensor, dim)

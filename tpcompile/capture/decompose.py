"""Which composite operators a captured program is made without: those that no rule knows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from tpcompile.rules.table import has_rule

# Taken apart, these would become a loop over time steps, of as many as the example has.
_LOOPS = ("aten.lstm", "aten.gru", "aten.rnn_tanh", "aten.rnn_relu")


@functools.cache
def _composites() -> dict[OpOverload, Callable[..., Any]]:
    """Every operator that torch composes of others, with how it does so."""
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return {
        op: how
        for op, how in torch.export.default_decompositions().items()
        if torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), composite)
    }


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Composite operators without a rule, for ``ExportedProgram.run_decompositions``.

    ``multiply`` becomes ``mul``, ``fft_fftn`` becomes ``_fft_c2c``; ``linear`` and attention, which have
    rules, stay. A rule that a user registers keeps its operator.
    """
    return {
        op: how for op, how in _composites().items() if not has_rule(op) and not str(op).startswith(_LOOPS)
    }


def decomposed_names() -> tuple[str, ...]:
    """The names of these operators: a captured program depends on them."""
    return tuple(sorted(map(str, decompositions())))

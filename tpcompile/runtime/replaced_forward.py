"""A forward that was set on a part of a model: programs have it in them, and run before it."""

from __future__ import annotations

from torch import nn

from tpcompile.errors import TpCompileError

LIFTED = "_tp_forward"
"""The attribute under which a guarded module keeps a forward that was set on the instance."""


def lift_forward(module: nn.Module) -> None:
    """Takes a forward that was set on the instance out of the way of the class's, which runs programs.

    Raises:
        TpCompileError: there is one already; whether the new one is to call it, nobody knows.
    """
    own = module.__dict__
    if "forward" in own:
        forward = own.pop("forward")
        if LIFTED in own:
            raise TpCompileError(
                "the forward of a part of a sharded model is replaced again",
                where=type(module).__name__,
                todo="replace it once, or before parallelize",
            )
        own[LIFTED] = forward

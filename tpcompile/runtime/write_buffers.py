"""The buffers that a program has changed get their new values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpcompile.capture.export.specs import OutputSpec
from tpcompile.errors import TpCompileError

from .fetch_inputs import Feed


def write_buffers(
    feeds: Sequence[Feed], buffers: Sequence[Tensor], specs: Sequence[OutputSpec], flat: Sequence[Any]
) -> None:
    """Writes a program's last results into buffers.

    Args:
        feeds: where the buffers are.
        buffers: what the program reads of them.
        specs: the program's results.
        flat: their values.
    """
    count = len(buffers)
    for feed, held, spec, new in zip(feeds, buffers, specs[-count:], flat[-count:], strict=True):
        # One that an earlier program has divided takes its part of the whole value.
        buffer = held if held.shape == new.shape else getattr(feed.module, feed.name)
        compiling = torch.compiler.is_compiling()
        with torch.no_grad():
            if not compiling and not buffer.is_leaf:
                buffer.detach_()
            buffer.copy_(new)
        if spec.carried and new.requires_grad and not compiling:
            _Left.apply(buffer, new.detach().new_zeros((), requires_grad=True), spec.name)


class _Left(torch.autograd.Function):
    """A buffer's value that has come out of a call with its gradient, which stops here.

    The buffer wants a gradient from here on, as it does without a compiler; ``detach_()`` ends that.
    """

    @staticmethod
    def forward(ctx: Any, buffer: Tensor, wanted: Tensor, name: str) -> Tensor:
        ctx.mark_dirty(buffer)
        ctx.name = name
        return buffer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise TpCompileError(
            f"a gradient would go on into the call before, through what that has left in {ctx.name}",
            where=ctx.name,
            todo="let forward leave value.detach(); or keep it in an attribute that is no buffer",
        )

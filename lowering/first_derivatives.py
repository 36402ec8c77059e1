"""Backwards that are not differentiated themselves: other uses of their results are refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import is_batchedtensor, is_legacy_batchedtensor

from .send import Begun


class _Once(torch.autograd.Function):
    """A gradient. Its own would need the placement of a second derivative, which nobody has planned."""

    @staticmethod
    def forward(grad: Tensor, compute: Callable[[Tensor], Any]) -> Any:
        return compute(grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise TpCompileError(
            "second derivatives do not go through the collectives of a sharded model",
            where="backward",
            todo="use first derivatives (create_graph=False), or keep this model whole",
        )


def once(backward: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    """A backward of one gradient, whose result is not differentiated; other uses are refused.

    Under ``vmap`` (``is_grads_batched``, a vectorised jacobian) a collective would see one of several
    gradients, and answer with what this rank has.
    """

    def wrapped(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:  # behind a call of several results, of which the loss uses others
            return (None,) * len(ctx.needs_input_grad)
        refuse_several(grad)
        if torch.is_grad_enabled() and grad.requires_grad:
            return _Once.apply(grad, functools.partial(backward, ctx))
        return backward(ctx, grad)

    return wrapped


def begin_once(x: Tensor, begin: Callable[[Tensor], Begun]) -> Begun:
    """Begins to send in a backward whose result is not differentiated; other uses are refused."""
    if torch.is_grad_enabled() and x.requires_grad:
        done = _Once.apply(x, lambda a: begin(a)())
        return lambda: done
    return begin(x)


def refuse_several(grad: Tensor) -> None:
    """Refuses a gradient that stands for several.

    Raises:
        TpCompileError: it does.
    """
    if is_batchedtensor(grad) or is_legacy_batchedtensor(grad):
        raise TpCompileError(
            "several gradients at once (vmap, is_grads_batched) do not go through the collectives of a "
            "sharded model",
            where="backward",
            todo="take them one after the other: jacobian(vectorize=False)",
        )

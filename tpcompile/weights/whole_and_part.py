"""Between whole tensors and their parts, for autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from tpcompile.errors import TpCompileError

from .tensor_layout import TensorLayout

_TENSOR: Any = Tensor


class Gathered(torch.autograd.Function):
    """The whole of a part. Every rank computes the same with it, so that its gradient is cut."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, where: TensorLayout) -> Tensor:
        ctx.where = where
        return where.gather(local.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.where.cut(grad), None


class FromWhole(torch.autograd.Function):
    """A part of a tensor that is whole on every rank, as the class of sharded tensors."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, where: TensorLayout, kind: Any) -> Tensor:
        return kind(where.cut(whole.detach()), where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.full_tensor() if isinstance(grad, DTensor) else grad, None, None


class ToLocal(torch.autograd.Function):
    """The plain part of a sharded tensor that was computed."""

    @staticmethod
    def forward(ctx: Any, tensor: Any) -> Tensor:
        ctx.where, ctx.kind = tensor.placing, type(tensor)
        return tensor._local_tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.kind(grad, ctx.where)


def move_gradient(parameter: Any) -> None:
    """Moves a gradient that has come to a parameter, through python that read it, to the leaf inside.

    Raises:
        TpCompileError: data parallelism or a hook is to see the leaf's gradient.
    """
    gradient = _TENSOR.grad.__get__(parameter)
    _TENSOR.grad.__set__(parameter, None)
    leaf = parameter._local_tensor
    if parameter.averaged or leaf._backward_hooks or leaf._post_accumulate_grad_hooks:
        raise TpCompileError(
            "python has read a weight whose gradients data parallelism, or a hook, is to see",
            where=parameter.placing.name,
            todo="compute with the weight inside of the model's forward",
        )
    with torch.no_grad():
        part = parameter.part_of(gradient)
        leaf.grad = part.clone() if leaf.grad is None else leaf.grad + part

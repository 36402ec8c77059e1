"""Between whole tensors and their parts, for autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from .tensor_layout import TensorLayout


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

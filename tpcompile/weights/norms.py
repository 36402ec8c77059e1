"""Norms and sums of whole tensors, of which ranks hold parts; what several ranks hold counts once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .tensor_layout import TensorLayout


def norms(tensors: Sequence[Any], order: float, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The norm of each tensor, with one collective for all.

    Args:
        tensors: sharded ones; plain ones are whole on every rank.
        order: of the norm, positive.
        dtype: of the results; by default that of each tensor.
    """
    wheres: list[TensorLayout | None] = [getattr(t, "placing", None) for t in tensors]
    shared = next((w for w in wheres if w is not None and not w.whole), None)
    everyone = 1 if shared is None else shared.layout.ranks
    pieces: list[Tensor] = []
    holders: list[float] = []
    owners: list[int] = []
    for i, (tensor, where) in enumerate(zip(tensors, wheres, strict=True)):
        if where is None or where.whole:
            parts = [(tensor if where is None else tensor._local_tensor, everyone)]
        else:
            parts = where.segments(tensor._local_tensor)
        for part, copies in parts:
            if part.numel():
                pieces.append(part.detach())
                holders.append(copies)
                owners.append(i)
    device = tensors[0].device
    found = torch.zeros(len(tensors), dtype=torch.float64, device=device)
    if pieces:
        wide = torch.promote_types(pieces[0].dtype, torch.float32)
        each = torch.stack(torch._foreach_norm(pieces, order, dtype=wide)).double()
        index = torch.tensor(owners, device=device)
        if math.isinf(order):
            found.scatter_reduce_(0, index, each, "amax")
        else:
            found.index_add_(
                0, index, each.pow(order) / torch.tensor(holders, dtype=torch.float64, device=device)
            )
    if shared is not None:
        op = dist.ReduceOp.MAX if math.isinf(order) else dist.ReduceOp.SUM
        dist.all_reduce(found, op, group=shared.group)
    if not math.isinf(order):
        found = found.pow(1 / order)
    kinds = {dtype or t.dtype for t in tensors}
    if len(kinds) == 1:
        return list(found.to(kinds.pop()).unbind())
    return [value.to(dtype or t.dtype) for value, t in zip(found, tensors, strict=True)]


def total(tensor: Any) -> Tensor:
    """The sum of all elements of a sharded tensor."""
    where, local = tensor.placing, tensor._local_tensor.detach()
    if where.whole or not local.is_floating_point():
        return where.gather(local).sum()
    parts = [part.sum(dtype=torch.float64) / copies for part, copies in where.segments(local)]
    found = torch.stack(parts).sum()
    dist.all_reduce(found, group=where.group)
    return found.to(local.dtype)

"""Norms and sums of whole tensors, of which ranks hold parts; what several ranks hold counts once."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpcompile.errors import RanksApart, TpCompileError
from tpcompile.ranks.agree import compare
from tpcompile.ranks.exchange import exchange

from .tensor_layout import TensorLayout


@dataclass(frozen=True)
class _Pieces:
    """What this rank holds of tensors.

    Attributes:
        norms: of each piece, in float64.
        holders: how many ranks hold the same piece.
        owners: the positions of the tensors that the pieces belong to.
        names: of all tensors.
        shared: a layout whose ranks hold different parts; None if every rank holds everything.
    """

    norms: Tensor
    holders: Tensor
    owners: list[int]
    names: list[str]
    shared: TensorLayout | None


def _shared(wheres: Iterable[TensorLayout | None]) -> TensorLayout | None:
    """A layout whose ranks hold different parts; None if every rank holds everything.

    Raises:
        TpCompileError: tensors belong to models over different ranks.
    """
    first: TensorLayout | None = None
    for where in wheres:
        if where is None or where.whole or where.axis is (first and first.axis):
            continue
        if first is not None and where.axis.group_name != first.axis.group_name:
            raise TpCompileError(
                "one norm of parameters of several models, which are sharded over different ranks",
                where=f"{first.name}, {where.name}",
                todo="take the norm of each model's parameters, then that of the norms",
            )
        first = first or where
    return first


def _pieces(tensors: Sequence[Any], order: float, asked: str = "") -> _Pieces:
    """What this rank holds of tensors; plain ones are whole on every rank.

    Raises:
        TpCompileError: they belong to models over different ranks; or ranks ask for different things, and it
            takes more than one message to answer.
    """
    wheres: list[TensorLayout | None] = [getattr(t, "placing", None) for t in tensors]
    shared = _shared(wheres)
    names = ["" if w is None else w.name for w in wheres]
    if any(w is not None and w.param.selection is not None for w in wheres):  # each of which is gathered
        todo = "call it with the same parameters and arguments on every rank"
        compare(None if shared is None else shared.group, "norms", [f"{asked} {order}", *names], todo)
    everyone = [1 if shared is None else shared.layout.ranks]
    pieces: list[Tensor] = []
    holders: list[int] = []
    owners: list[int] = []
    for i, (tensor, where) in enumerate(zip(tensors, wheres, strict=True)):
        parts, copies = [tensor if where is None else tensor._local_tensor], everyone
        if where is not None and where.param.selection is not None:  # who shares what is not known
            parts = [where.gather(parts[0])]
        elif where is not None and not where.whole:
            parts, copies = where.segments(parts[0]), where.copies
        for part, count in zip(parts, copies, strict=True):
            if part.numel():
                pieces.append(part)
                holders.append(count)
                owners.append(i)
    device = tensors[0].device
    norms = torch.zeros(0, dtype=torch.float64, device=device)
    if pieces:
        wide = functools.reduce(torch.promote_types, {piece.dtype for piece in pieces}, torch.float32)
        norms = torch.stack(torch._foreach_norm(pieces, order, dtype=wide)).double()
    counts = torch.tensor(holders, dtype=torch.float64, device=device)
    return _Pieces(norms, counts, owners, names, shared)


def norms(tensors: Sequence[Any], order: float, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The norm of each tensor, with one collective for all.

    Args:
        tensors: sharded ones; plain ones are whole on every rank.
        order: of the norm, positive.
        dtype: of the results; by default that of each tensor.
    """
    held = _pieces(tensors, order)
    found = torch.zeros(len(tensors), dtype=torch.float64, device=held.norms.device)
    index = torch.tensor(held.owners, dtype=torch.int64, device=found.device)
    if math.isinf(order):
        found.scatter_reduce_(0, index, held.norms, "amax")
    else:
        found.index_add_(0, index, held.norms.pow(order) / held.holders)
    found = _over_ranks(found, order, held.shared, held.names)
    kinds = {(dtype or t.dtype).to_real() for t in tensors}
    if len(kinds) == 1:
        return list(found.to(kinds.pop()).unbind())
    return [value.to((dtype or t.dtype).to_real()) for value, t in zip(found, tensors, strict=True)]


def total_norm(tensors: Sequence[Any], order: float, asked: str) -> Tensor:
    """The norm of the norms of tensors, with one message.

    Args:
        tensors: as for ``norms``.
        order: of both norms, positive.
        asked: what else must be the same on all ranks.

    Raises:
        RanksApart: ranks ask for different things; nothing is changed.
    """
    held = _pieces(tensors, order, asked)
    if math.isinf(order):
        found = torch.cat([held.norms, held.norms.new_zeros(1)]).amax(0, keepdim=True)
    else:
        found = (held.norms.pow(order) / held.holders).sum(0, keepdim=True)
    found = _over_ranks(found, order, held.shared, [asked, *held.names]).squeeze()
    return found.to(functools.reduce(torch.promote_types, {t.dtype.to_real() for t in tensors}))


def total(tensor: Any, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of all elements of a sharded tensor.

    Args:
        tensor: the tensor.
        dtype: of the sum; by default that of the tensor, or what torch makes of it.
    """
    where, local = tensor.placing, tensor._local_tensor.detach()
    dtype = dtype or (local.dtype if local.is_floating_point() else None)
    floats = local.is_floating_point() and dtype is not None and dtype.is_floating_point
    if where.whole or where.param.selection is not None or not floats:
        return where.gather(local).sum(dtype=dtype)
    parts = [part.sum(dtype=torch.float64) for part in where.segments(local)]
    found = torch.stack([part / count for part, count in zip(parts, where.copies, strict=True)])
    return _over_ranks(found.sum(0, keepdim=True), 1.0, where, [where.name]).squeeze().to(dtype)


def _over_ranks(found: Tensor, order: float, shared: TensorLayout | None, asked: list[str]) -> Tensor:
    """What all ranks have found together, with a checksum of what they were asked in the same message.

    It is a message of its own kind (``exchange``): a sum of gloo's would be taken for one of a program's on a
    rank that runs one.

    Args:
        found: sums of powers; for infinite orders norms.
        order: of the norms.
        shared: says which ranks; None if there are no others.
        asked: equal on all ranks.

    Raises:
        RanksApart: it is not.
    """
    largest = math.isinf(order)
    if shared is not None:
        mark = zlib.crc32(repr((order, asked)).encode())
        everyone = exchange(shared.group, "add up norms or sums of weights", (mark, found.tolist()))
        if len({each for each, _ in everyone}) > 1:
            raise RanksApart(
                "the ranks take norms of different parameters, or clip them differently",
                where=asked[0],
                todo="call it with the same parameters and arguments on every rank",
            )
        parts = found.new_tensor([numbers for _, numbers in everyone])
        found = parts.amax(0) if largest else parts.sum(0)
    return found if largest else found.pow(1 / order)

"""What the collectives move, as plain functions over `_c10d_functional`, without any gradient.

Dimension-0 operators are all that `_c10d_functional` has: the functions here bring the divided dimension
to the front, pad where the ranks' shards differ, and undo both. Sizes of the divided dimension are static,
all other sizes may be symbolic. All of it works with gloo (torch 2.13, every dtype used here) and NCCL.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tpcompile.errors import TpCompileError

from .send import exchange_rows, gather_rows, reduce_all, reduce_scatter_rows


def reduce(x: Tensor, group: str, op: str) -> Tensor:
    """The elementwise reduction over the ranks, whole on each.

    What is not a number on any rank is none in a maximum either. That is for us to see to: gloo's is what
    comparisons give, which are false for NaN.
    """
    _check_op(op, x)
    if op != "sum" and x.is_floating_point():
        unknown = x.isnan()
        known = torch.where(unknown, 0.0, x if op == "max" else -x)
        best, any_unknown = reduce_all(torch.stack([known, unknown.to(x.dtype)]), "max", group).unbind(0)
        return torch.where(any_unknown > 0, torch.nan, best if op == "max" else -best)
    # The meta kernel keeps x's strides, the real one doesn't: they agree on contiguous tensors only.
    return reduce_all(x.contiguous(), op, group)


def gather(x: Tensor, group: str, dim: int, sizes: list[int], index: int) -> Tensor:
    """The ranks' shards, concatenated along `dim`."""
    ranks, largest = len(sizes), max(sizes)
    dim = _normal(dim, x)
    _check_size("all_gather", x, dim, sizes[index])
    shape = list(x.shape)
    if largest == 0:
        return x.new_empty(shape)
    padded = _fill_up(x, dim, largest)
    rows = gather_rows(padded.contiguous(), ranks, group)
    pieces = rows.view(ranks, *padded.shape)
    if min(sizes) == largest:
        # One copy at most, and none where nothing precedes `dim` (or only sizes of 1).
        return pieces.movedim(0, dim).reshape(*shape[:dim], ranks * largest, *shape[dim + 1 :])
    return torch.cat([pieces[i].narrow(dim, 0, size) for i, size in enumerate(sizes)], dim)


def reduce_scatter(x: Tensor, group: str, dim: int, sizes: list[int], index: int) -> Tensor:
    """This rank's shard of the sum over the ranks."""
    ranks, largest = len(sizes), max(sizes)
    dim = _normal(dim, x)
    _check_op("sum", x)
    _check_size("reduce_scatter", x, dim, sum(sizes))
    shape = list(x.shape)
    if largest == 0:
        return x.new_empty(shape)
    if min(sizes) == largest:
        pieces = x.reshape(*shape[:dim], ranks, largest, *shape[dim + 1 :]).movedim(dim, 0)
    else:
        pieces = torch.stack([_fill_up(piece, dim, largest) for piece in x.split(sizes, dim)])
    own = reduce_scatter_rows(pieces.contiguous(), ranks, group).squeeze(0)
    return own if sizes[index] == largest else own.narrow(dim, 0, sizes[index])


def all_to_all(
    x: Tensor, group: str, src_dim: int, dst_dim: int, src_sizes: list[int], dst_sizes: list[int], index: int
) -> Tensor:
    """Shards of `src_dim` become shards of `dst_dim`.

    Raises:
        TpCompileError: both are the same dimension.
    """
    src, dst = _normal(src_dim, x), _normal(dst_dim, x)
    if src == dst:
        raise TpCompileError(
            "all_to_all needs two dimensions.",
            todo="report this program: it is a mistake of tpcompile",
            where=f"src_dim = dst_dim = {src}",
        )
    _check_size("all_to_all", x, src, src_sizes[index])
    _check_size("all_to_all", x, dst, sum(dst_sizes))
    own_src, own_dst = src_sizes[index], dst_sizes[index]
    # dst first and src second: what goes to one rank is then contiguous, and is counted in rows.
    ordered = x.movedim((dst, src), (0, 1))
    rest = list(ordered.shape[2:])
    rows = ordered.reshape(sum(dst_sizes) * own_src, *rest)
    sent = [size * own_src for size in dst_sizes]
    received = [size * own_dst for size in src_sizes]
    result = exchange_rows(rows.contiguous(), received, sent, group)
    pieces = [
        piece.view(own_dst, size, *rest).movedim((0, 1), (dst, src))
        for piece, size in zip(result.split(received), src_sizes, strict=True)
    ]
    return torch.cat(pieces, src)


def own_slice(x: Tensor, dim: int, sizes: list[int], index: int) -> Tensor:
    """This rank's shard of a whole tensor, a view."""
    _check_size("take_shard", x, dim, sum(sizes))
    return x.narrow(dim, sum(sizes[:index]), sizes[index])


def zero_pad(x: Tensor, dim: int, sizes: list[int], index: int) -> Tensor:
    """The whole tensor, zero but for this rank's shard."""
    _check_size("pad_shard", x, dim, sizes[index])
    return _pad(x, _normal(dim, x), sum(sizes[:index]), sum(sizes[index + 1 :]))


def _fill_up(x: Tensor, dim: int, size: int) -> Tensor:
    return _pad(x, dim, 0, size - x.shape[dim]) if x.shape[dim] < size else x


def _pad(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    if before == 0 and after == 0:
        return x.view_as(x)
    # torch counts pairs from the last dimension.
    return torch.constant_pad_nd(x, [0, 0] * (x.dim() - 1 - dim) + [before, after])


def _normal(dim: int, x: Tensor) -> int:
    if not -x.dim() <= dim < x.dim():
        raise TpCompileError(
            f"There is no dimension {dim} in a tensor of {x.dim()} dimensions.",
            where="collective",
            todo="report this program: it is a mistake of tpcompile",
        )
    return dim % x.dim()


def _check_op(op: str, x: Tensor) -> None:
    # gloo adds booleans as bytes, which leaves values that are neither True nor False.
    if op not in ("sum", "max", "min") or (op == "sum" and x.dtype == torch.bool):
        raise TpCompileError(
            f"The ranks' tensors can't be reduced by {op!r} in {x.dtype}.",
            where="collective",
            todo="Use 'sum', 'max' or 'min'; for bool, all_reduce by 'max' only.",
        )


def _check_size(name: str, x: Tensor, dim: int, expected: int) -> None:
    # A wrong size would otherwise pad, crop, or hang the ranks that have the right one.
    if x.shape[dim] != expected:
        raise TpCompileError(
            f"{name} expects size {expected} in dimension {dim} of its input, not {x.shape[dim]}.",
            where=f"input of shape {list(x.shape)}",
            todo="Compare `sizes` and `index` with the tensor that this rank holds.",
        )

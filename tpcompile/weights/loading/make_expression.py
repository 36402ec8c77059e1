"""Operators on expressions: what torch's do to tensors, in the few words that ``fill_tensor`` knows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tpcompile.ir.torch_internals import tree_map_only

from .expressions import (
    AddDim,
    Apply,
    Cast,
    Constant,
    Cut,
    DropDim,
    Elementwise,
    Expression,
    Join,
    Permute,
)


def same(of: Expression, *args: Any, **kwargs: Any) -> Expression:
    """The tensor itself, or a copy of it."""
    return of


def cast(of: Expression, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Expression:
    """A tensor in another type."""
    return of if dtype is None or dtype == of.dtype else Cast(of.shape, dtype, of)


def permute(of: Expression, dims: Sequence[int]) -> Expression:
    """A tensor with its dimensions in another order."""
    order = tuple(d % len(of.shape) for d in dims)
    return Permute(tuple(of.shape[d] for d in order), of.dtype, of, order)


def transpose(of: Expression, dim0: int, dim1: int) -> Expression:
    """A tensor with two dimensions exchanged."""
    order = list(range(len(of.shape)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permute(of, order)


def cat(parts: Sequence[Expression], dim: int = 0) -> Expression:
    """Tensors one behind the other.

    Raises:
        ValueError: their shapes do not fit.
    """
    parts = [p for p in parts if p.shape != (0,)] or list(parts[:1])  # cat skips these
    dim %= len(parts[0].shape)
    dtype = functools.reduce(torch.promote_types, (p.dtype for p in parts))
    for part in parts:
        if part.shape[:dim] + part.shape[dim + 1 :] != parts[0].shape[:dim] + parts[0].shape[dim + 1 :]:
            raise ValueError(f"shapes {parts[0].shape} and {part.shape} cannot be joined along {dim}")
    return join([cast(p, dtype=dtype) for p in parts], dim)


def join(parts: Sequence[Expression], dim: int) -> Expression:
    """Tensors of one type and of fitting shapes one behind the other."""
    flat: list[Expression] = []
    for part in parts:
        flat += part.parts if isinstance(part, Join) and part.dim == dim else [part]
    flat = [p for p in flat if p.shape[dim]] or flat[:1]
    if len(flat) == 1:
        return flat[0]
    shape = list(flat[0].shape)
    shape[dim] = sum(p.shape[dim] for p in flat)
    return Join(tuple(shape), flat[0].dtype, tuple(flat), dim)


def stack(parts: Sequence[Expression], dim: int = 0) -> Expression:
    """Tensors one behind the other along a new dimension.

    Raises:
        ValueError: their shapes differ.
    """
    dim %= len(parts[0].shape) + 1
    if len({p.shape for p in parts}) > 1:
        raise ValueError(f"shapes {sorted({p.shape for p in parts})} cannot be stacked")
    return cat([unsqueeze(p, dim) for p in parts], dim)


def unsqueeze(of: Expression, dim: int) -> Expression:
    """A tensor with another dimension, of size 1."""
    dim %= len(of.shape) + 1
    return AddDim(of.shape[:dim] + (1,) + of.shape[dim:], of.dtype, of, dim)


def drop(of: Expression, dim: int) -> Expression:
    """A tensor without a dimension, which has size 1."""
    if isinstance(of, AddDim) and of.dim == dim:
        return of.of
    return DropDim(of.shape[:dim] + of.shape[dim + 1 :], of.dtype, of, dim)


def squeeze(of: Expression, dim: int) -> Expression:
    """A tensor without a dimension if that has size 1."""
    dim %= len(of.shape)
    return drop(of, dim) if of.shape[dim] == 1 else of


def narrow(of: Expression, dim: int, start: int, length: int) -> Expression:
    """A part along one dimension."""
    if length == of.shape[dim]:
        return of
    if isinstance(of, Cut) and of.dim == dim:
        return narrow(of.of, dim, of.start + start, length)
    if isinstance(of, Join) and of.dim == dim and length:
        kept, begin = [], 0
        for part in of.parts:
            first, last = max(start - begin, 0), min(start + length - begin, part.shape[dim])
            kept += [narrow(part, dim, first, last - first)] if first < last else []
            begin += part.shape[dim]
        return join(kept, dim)
    return Cut(of.shape[:dim] + (length,) + of.shape[dim + 1 :], of.dtype, of, dim, start)


def select(of: Expression, dim: int, index: int) -> Expression:
    """A tensor at one place of a dimension, without it.

    Raises:
        ValueError: there is no such place.
    """
    dim %= len(of.shape)
    if not -of.shape[dim] <= index < of.shape[dim]:
        raise ValueError(f"dimension {dim} of shape {list(of.shape)} has no place {index}")
    return drop(narrow(of, dim, index % of.shape[dim], 1), dim)


def unbind(of: Expression, dim: int = 0) -> list[Expression]:
    """A tensor at each place of a dimension."""
    return [select(of, dim, i) for i in range(of.shape[dim])]


def split_sizes(of: Expression, sizes: Sequence[int], dim: int = 0) -> list[Expression]:
    """Parts of these lengths.

    Raises:
        ValueError: they are not the whole.
    """
    dim %= len(of.shape)
    if sum(sizes) != of.shape[dim]:
        raise ValueError(f"dimension {dim} of shape {list(of.shape)} is not one of parts of {list(sizes)}")
    return [narrow(of, dim, sum(sizes[:i]), size) for i, size in enumerate(sizes)]


def split(of: Expression, size: int, dim: int = 0) -> list[Expression]:
    """Parts of one length; the last may be shorter."""
    total = of.shape[dim]
    return split_sizes(of, [min(size, total - at) for at in range(0, total, size)] or [0], dim)


def expand(of: Expression, sizes: Sequence[int], **kwargs: Any) -> Expression:
    """A tensor repeated along new dimensions and those of size 1.

    Raises:
        ValueError: its other sizes are not those wanted.
    """
    new = len(sizes) - len(of.shape)
    shape = tuple(of.shape[d - new] if s == -1 else s for d, s in enumerate(sizes))
    if new < 0 or any(old not in (1, size) for old, size in zip(of.shape, shape[new:], strict=True)):
        raise ValueError(f"shape {list(of.shape)} cannot be expanded to {list(sizes)}")
    return of if shape == of.shape else Elementwise(shape, of.dtype, same, (of,), {})  # type: ignore[arg-type]


def filled(shape: Sequence[int], dtype: torch.dtype, value: Any) -> Expression:
    """A tensor of one value."""
    return expand(constant(torch.full((), value, dtype=dtype)), shape)


def constant(tensor: Tensor) -> Constant:
    """A tensor's elements as they are now: what it is changed to afterwards is another constant."""
    return Constant(tuple(tensor.shape), tensor.dtype, tensor.detach().clone())


def pad(of: Expression, pads: Sequence[int], value: Any = 0) -> Expression:
    """A tensor between some of one value: before and behind it in the last dimension, the one before, ...

    Raises:
        ValueError: some would be taken away.
    """
    if min(pads) < 0:
        raise ValueError(f"a conversion pads by {list(pads)}")
    for d, (before, behind) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        dim = len(of.shape) - 1 - d
        ends = [filled((*of.shape[:dim], n, *of.shape[dim + 1 :]), of.dtype, value) for n in (before, behind)]
        of = join([ends[0], of, ends[1]], dim)
    return of


def apply(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator of which no more is known; the shapes come from running it on valueless tensors."""
    result = on_meta(func, args, kwargs)
    if isinstance(result, Tensor):
        return Apply(tuple(result.shape), result.dtype, func, args, kwargs)
    parts = [Apply(tuple(r.shape), r.dtype, func, args, kwargs, i) for i, r in enumerate(result)]
    return type(result)(parts)


def elementwise(func: Any, args: Any, kwargs: Any) -> Expression:
    """An operator that makes each element of those at its place."""
    if kwargs or any(isinstance(x, list | tuple) for x in args):
        result = on_meta(func, args, kwargs)
        return Elementwise(tuple(result.shape), result.dtype, func, args, kwargs)
    said = tuple((type(x), (x.shape, x.dtype) if isinstance(x, Expression) else x) for x in args)
    return Elementwise(*_result(func, said), func, args, kwargs)


@functools.lru_cache(maxsize=1000)
def _result(func: Any, args: tuple[tuple[type, Any], ...]) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and type of an operator's result: all experts have the same."""
    tensors = (
        torch.empty(x[0], dtype=x[1], device="meta") if issubclass(t, Expression) else x for t, x in args
    )
    found = func(*tensors)
    return tuple(found.shape), found.dtype


def look_up(table: Expression, indices: Sequence[Expression | None]) -> Expression:
    """Elements of a table that is a constant, or any other indexing."""
    index = indices[0]
    if isinstance(table, Constant) and len(table.shape) == len(indices) == 1 and index is not None:
        if index.dtype in (torch.int32, torch.int64):  # others are masks
            func = functools.partial(_look_up, table.tensor)
            return Elementwise(index.shape, table.dtype, func, (index,), {})
    found: Expression = apply(torch.ops.aten.index.Tensor, (table, indices), {})
    return found


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return table[index]


def on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator makes of tensors without values."""

    def empty(e: Expression) -> Tensor:
        return torch.empty(e.shape, dtype=e.dtype, device="meta")

    fake_args, fake_kwargs = tree_map_only(Expression, empty, (args, kwargs))
    return func(*fake_args, **fake_kwargs)

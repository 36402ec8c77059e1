"""Fills a tensor with a box of an expression, and reads no more than that where operators allow it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tpcompile.ir.torch_internals import tree_map_only

from .expressions import AddDim, Apply, Cast, Cut, DropDim, Expression, Join, Leaf, Permute


class Filler:
    """Fills tensors with parts of one expression.

    What needs its operands as a whole (a reshape) is computed once and kept while this object lives.

    Args:
        read: gives a leaf, as a tensor that may be a view of a mapped file.
    """

    def __init__(self, read: Callable[[Leaf], Tensor]) -> None:
        self.read = read
        self._whole: dict[int, Tensor] = {}

    def fill(self, target: Tensor, e: Expression, offsets: Sequence[int]) -> None:
        """Writes a box of an expression into the target: as large as it, beginning at ``offsets``."""
        if 0 in target.shape:
            return
        if isinstance(e, Leaf):
            target.copy_(_box(self.read(e), offsets, target.shape))
        elif isinstance(e, Join):
            self._fill_join(target, e, offsets)
        elif isinstance(e, Permute):
            back = sorted(range(len(e.dims)), key=lambda i: e.dims[i])
            self.fill(target.permute(back), e.of, [offsets[i] for i in back])
        elif isinstance(e, Cut):
            moved = [o + e.start if d == e.dim else o for d, o in enumerate(offsets)]
            self.fill(target, e.of, moved)
        elif isinstance(e, AddDim):
            self.fill(target.select(e.dim, 0), e.of, [*offsets[: e.dim], *offsets[e.dim + 1 :]])
        elif isinstance(e, DropDim):
            self.fill(target.unsqueeze(e.dim), e.of, [*offsets[: e.dim], 0, *offsets[e.dim :]])
        elif isinstance(e, Cast) and target.dtype == e.dtype:
            self.fill(target, e.of, offsets)
        elif isinstance(e, Cast):
            between = torch.empty(target.shape, dtype=e.dtype, device=target.device)
            self.fill(between, e.of, offsets)
            target.copy_(between)
        else:
            target.copy_(_box(self.whole(e), offsets, target.shape))

    def _fill_join(self, target: Tensor, e: Join, offsets: Sequence[int]) -> None:
        first, last = offsets[e.dim], offsets[e.dim] + target.shape[e.dim]
        begin = 0
        for part in e.parts:
            end = begin + part.shape[e.dim]
            start, stop = max(first, begin), min(last, end)
            if start < stop:
                inside = [start - begin if d == e.dim else o for d, o in enumerate(offsets)]
                self.fill(target.narrow(e.dim, start - first, stop - start), part, inside)
            begin = end

    def whole(self, e: Expression) -> Tensor:
        """All of an expression; perhaps a view of a leaf."""
        if isinstance(e, Leaf):
            return self.read(e)
        if isinstance(e, Permute):
            return self.whole(e.of).permute(e.dims)
        if isinstance(e, Cut):
            return self.whole(e.of).narrow(e.dim, e.start, e.shape[e.dim])
        if isinstance(e, AddDim):
            return self.whole(e.of).unsqueeze(e.dim)
        if isinstance(e, DropDim):
            return self.whole(e.of).select(e.dim, 0)
        if id(e) not in self._whole:
            self._whole[id(e)] = self._make(e)
        return self._whole[id(e)]

    def _make(self, e: Expression) -> Tensor:
        if isinstance(e, Apply):
            args: Any
            args, kwargs = tree_map_only(Expression, lambda x: self.whole(x).contiguous(), (e.args, e.kwargs))
            result: Any = e.func(*args, **kwargs)
            found: Tensor = result if e.index is None else result[e.index]
            return found
        made = torch.empty(e.shape, dtype=e.dtype)
        self.fill(made, e, [0] * len(e.shape))
        return made


def _box(tensor: Tensor, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
    for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
        if size != tensor.shape[dim]:
            tensor = tensor.narrow(dim, start, size)
    return tensor

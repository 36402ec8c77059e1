"""Fills a tensor with a box of an expression, and reads no more than that where operators allow it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
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
    Leaf,
    Permute,
    Reshape,
)
from .reshape import groups, pieces

_MOST = 1 << 20  # elements that are computed at once


class Filler:
    """Fills tensors with parts of one expression.

    What needs its operands as a whole is computed once and kept while this object lives.

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
        if isinstance(e, Leaf | Constant):
            target.copy_(self.box(e, offsets, target.shape))
        elif isinstance(e, Cast | Reshape | Elementwise) and target.numel() > _MOST:
            for start, part in _in_parts(target, offsets):
                self.fill(part, e, start)
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
        elif isinstance(e, Reshape):
            self._fill_reshaped(target, e, offsets)
        elif isinstance(e, Elementwise):
            self._compute(target, e, offsets)
        else:
            target.copy_(self.box(e, offsets, target.shape))

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

    def _fill_reshaped(self, target: Tensor, e: Reshape, offsets: Sequence[int]) -> None:
        """Finds the boxes of the other shape that have the elements; whole rows of them where need be."""
        found = [
            list(pieces(e.of.shape[g.before], e.shape[g.after], offsets[g.after], target.shape[g.after]))
            for g in groups(e.of.shape, e.shape)
        ]
        for combined in itertools.product(*found):
            cover = [size for piece in combined for size in piece.cover]
            made = torch.empty(cover, dtype=e.dtype)
            self.fill(made, e.of, [o for piece in combined for o in piece.offsets])
            made = made.view([math.prod(piece.cover) for piece in combined])
            to, dim = target, 0
            for piece in combined:
                made = piece.cut(made, dim)
                for start, size in zip(piece.target, piece.sizes, strict=True):
                    to = to.narrow(dim, start, size)
                    dim += 1
            to.copy_(made)

    def _compute(self, target: Tensor, e: Elementwise, offsets: Sequence[int]) -> None:
        def operand(x: Expression) -> Tensor:
            new = len(e.shape) - len(x.shape)
            sizes = [s if s == 1 else target.shape[new + d] for d, s in enumerate(x.shape)]
            start = [0 if s == 1 else offsets[new + d] for d, s in enumerate(x.shape)]
            if isinstance(x, Leaf | Constant):
                return self.box(x, start, sizes)
            made = torch.empty(sizes, dtype=x.dtype)
            self.fill(made, x, start)
            return made

        args, kwargs = tree_map_only(Expression, operand, (e.args, e.kwargs))
        target.copy_(e.func(*args, **kwargs))

    def box(self, e: Expression, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A box of what is there, or is made as a whole; a view of it."""
        tensor = self.whole(e)
        for dim, (start, size) in enumerate(zip(offsets, sizes, strict=True)):
            if size != tensor.shape[dim]:
                tensor = tensor.narrow(dim, start, size)
        return tensor

    def whole(self, e: Expression) -> Tensor:
        """All of an expression; perhaps a view of a leaf."""
        if isinstance(e, Leaf):
            return self.read(e)
        if isinstance(e, Constant):
            return e.tensor
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


def _in_parts(target: Tensor, offsets: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
    """A box in parts of about as many elements as are computed at once, and where they begin.

    They begin at multiples of powers of two, so that blocks of such a size are seldom cut.
    """
    dim = next(d for d, size in enumerate(target.shape) if size > 1)
    rows = max(1, _MOST * target.shape[dim] // target.numel())
    rows = 1 << (rows.bit_length() - 1)
    at = offsets[dim]
    while (start := at - offsets[dim]) < target.shape[dim]:
        count = min(rows - at % rows, target.shape[dim] - start)
        yield [*offsets[:dim], at, *offsets[dim + 1 :]], target.narrow(dim, start, count)
        at += count

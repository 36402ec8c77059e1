"""Reshapes of expressions, and what is made of them: slices with steps, bytes of larger numbers.

They are moved towards the leaves as far as they go, so that those which undo each other vanish and what a
rank needs stays a box.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tpcompile.ir.torch_internals import tree_map_only

from .expressions import (
    AddDim,
    Cast,
    Constant,
    Cut,
    DropDim,
    Elementwise,
    Expression,
    Join,
    Reshape,
    operands,
)
from .make_expression import apply, cast, constant, elementwise, join, narrow, select, unsqueeze
from .reshape import Group, groups

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def slice_(
    of: Expression, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Expression:
    """What a slice has of one dimension."""
    dim %= len(of.shape)
    places = range(*slice(start, end, step).indices(of.shape[dim]))
    return strided(of, dim, places.start, len(places), step)


def strided(of: Expression, dim: int, start: int, count: int, step: int) -> Expression:
    """Places of one dimension at equal distances."""
    if step == 1 or count <= 1:
        return narrow(of, dim, start, count)
    first, size = start - start % step, count * step
    if first + size > of.shape[dim]:
        stop = start + (count - 1) * step + 1
        found: Expression = apply(torch.ops.aten.slice.Tensor, (of, dim, start, stop, step), {})
        return found
    taken = narrow(of, dim, first, size)
    return select(reshape(taken, (*of.shape[:dim], count, step, *of.shape[dim + 1 :])), dim + 1, start % step)


def bits(of: Expression, dtype: torch.dtype) -> Expression:
    """A tensor's bytes as numbers of another type; smaller ones are found by shifts."""
    if dtype.itemsize == of.dtype.itemsize:
        return Elementwise(of.shape, dtype, functools.partial(_bits, dtype), (of,), {})
    if dtype.itemsize > of.dtype.itemsize or sys.byteorder != "little":
        found: Expression = apply(torch.ops.aten.view.dtype, (of, dtype), {})
        return found
    whole, small = _INTEGERS[of.dtype.itemsize], _INTEGERS[dtype.itemsize]
    shifts = torch.arange(0, 8 * whole.itemsize, 8 * small.itemsize, dtype=whole)
    operand = unsqueeze(bits(of, whole), len(of.shape))
    parts = elementwise(torch.ops.aten.bitwise_right_shift.Tensor, (operand, constant(shifts)), {})
    return reshape(bits(cast(parts, dtype=small), dtype), (*of.shape[:-1], of.shape[-1] * len(shifts)))


def _bits(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.view(dtype)


def reshape(of: Expression, shape: Sequence[int], *dtype: None) -> Expression:
    """The elements in another shape; one size may be -1.

    Raises:
        ValueError: it has another number of elements.
    """
    if -1 in shape:
        rest = -math.prod(shape)
        shape = [math.prod(of.shape) // rest if s == -1 else s for s in shape]
    shape = tuple(shape)
    if math.prod(shape) != math.prod(of.shape):
        raise ValueError(f"shape {list(of.shape)} cannot become {list(shape)}")
    if shape == of.shape:
        return of
    if isinstance(of, Reshape | AddDim | DropDim):
        return reshape(of.of, shape)
    if isinstance(of, Constant):
        return constant(of.tensor.reshape(shape))
    below = of if 0 in shape else _below(of, shape)
    return below if below.shape == shape else Reshape(shape, of.dtype, below)


def _below(of: Expression, shape: tuple[int, ...]) -> Expression:
    """A tensor with those groups of dimensions in their new shape for which its operands can be reshaped."""
    found = groups(of.shape, shape)
    passes = [_passes(of, group) for group in found]
    between = _joined(shape[g.after] if p else of.shape[g.before] for g, p in zip(found, passes, strict=True))
    if between == of.shape:
        return of
    if isinstance(of, Cast):
        return Cast(between, of.dtype, reshape(of.of, between))
    if isinstance(of, Join | Cut):
        before = [(g, p) for g, p in zip(found, passes, strict=True) if g.before.stop <= of.dim]
        dim = of.dim + sum(len(shape[g.after]) - len(of.shape[g.before]) for g, p in before if p)

        def sized(size: int) -> tuple[int, ...]:
            return between[:dim] + (size,) + between[dim + 1 :]

        if isinstance(of, Cut):
            return narrow(reshape(of.of, sized(of.of.shape[of.dim])), dim, of.start, of.shape[of.dim])
        return join([reshape(part, sized(part.shape[of.dim])) for part in of.parts], dim)
    assert isinstance(of, Elementwise)

    def operand(x: Expression) -> Expression:
        if not x.shape:
            return x  # a number: it does not take part in choosing the type
        sizes = _aligned(x, of)
        new = _joined(
            sizes[g.before]
            if not p
            else shape[g.after]
            if sizes[g.before] == of.shape[g.before]
            else (1,) * len(shape[g.after])
            for g, p in zip(found, passes, strict=True)
        )
        return reshape(x, new)

    args, kwargs = tree_map_only(Expression, operand, (of.args, of.kwargs))
    return Elementwise(between, of.dtype, of.func, args, kwargs)


def _passes(of: Expression, group: Group) -> bool:
    """Whether reshaping these dimensions of the operands gives the same."""
    if isinstance(of, Join | Cut):
        return not group.before.start <= of.dim < group.before.stop
    if isinstance(of, Elementwise):
        sizes = [_aligned(x, of)[group.before] for x in operands(of)]
        return all(s == of.shape[group.before] or set(s) <= {1} for s in sizes)
    return isinstance(of, Cast)


def _aligned(x: Expression, of: Expression) -> tuple[int, ...]:
    """An operand's shape with as many dimensions as the result's."""
    return (1,) * (len(of.shape) - len(x.shape)) + x.shape


def _joined(shapes: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(size for shape in shapes for size in shape)

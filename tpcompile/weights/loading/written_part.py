"""Parts of a buffer that a conversion writes into: the whole is its parts, joined."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import make_expression as make
from .expressions import Expression
from .reshape_expression import reshape, strided

aten = torch.ops.aten


class Places(NamedTuple):
    """Places of one dimension: ``start``, ``start + step``, ...

    Attributes:
        dim: the dimension.
        start: the first place.
        length: how many there are.
        step: from one to the next.
        drop: whether the part is without this dimension, of one place.
    """

    dim: int
    start: int
    length: int
    step: int
    drop: bool

    def of(self, e: Expression) -> Expression:
        """This part of a tensor."""
        found = strided(e, self.dim, self.start, self.length, self.step)
        return make.drop(found, self.dim) if self.drop else found


def parts_of(func: Any, args: Sequence[Any], kwargs: Any) -> tuple[Places, ...] | None:
    """The part that an operator takes of its first argument, if it is one that can be written into."""
    if func in (aten.alias.default, aten.detach.default):
        return ()
    if func is aten.slice.Tensor and not kwargs:
        given: list[Any] = [*args[1:], *(0, None, None, 1)[len(args) - 1 :]]
        dim, start, end, step = given
        dim %= args[0].ndim
        places = range(*slice(start, end, step).indices(args[0].shape[dim]))
        return (Places(dim, places.start, len(places), step, False),)
    if func is aten.select.int and not kwargs:
        of, dim, index = args
        return (Places(dim % of.ndim, index % of.shape[dim], 1, 1, True),)
    return None


def put(whole: Expression, parts: Sequence[Places], value: Expression) -> Expression | None:
    """The whole with a value in the place of a part of a part of ... it; None if that cannot be said."""
    if not parts:
        return value
    part = parts[0]
    inner = put(part.of(whole), parts[1:], value)
    if inner is None or not part.length:
        return whole if inner is not None else None
    dim, step = part.dim, part.step
    if part.drop:
        inner = make.unsqueeze(inner, dim)
    first, size = part.start, part.length
    if step != 1:
        first, size = part.start - part.start % step, part.length * step
        if first + size > whole.shape[dim]:
            return None
        taken = make.narrow(whole, dim, first, size)
        apart = reshape(taken, (*taken.shape[:dim], part.length, step, *taken.shape[dim + 1 :]))
        slot = Places(dim + 1, part.start % step, 1, 1, True)
        joined = put(apart, [slot], inner)
        assert joined is not None
        inner = reshape(joined, taken.shape)
    last = first + size
    before = make.narrow(whole, dim, 0, first)
    behind = make.narrow(whole, dim, last, whole.shape[dim] - last)
    return make.join([before, inner, behind], dim)

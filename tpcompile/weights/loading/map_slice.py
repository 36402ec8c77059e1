"""Takes a slice that is in one piece in a file as it is: mapped, not copied."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from .expressions import Cut, Expression, Join
from .read_headers import Stored, extent


def map_slice(
    e: Expression, offsets: Sequence[int], sizes: Sequence[int], dtype: torch.dtype
) -> Tensor | None:
    """A box of an expression as memory of its file, or None if it would have to be copied.

    The mapping is private: what is written to it goes to pages of this process, not to the file. It lasts
    as long as the tensor.

    Args:
        e: the whole parameter.
        offsets: where the box begins in it.
        sizes: its shape.
        dtype: the type in which it is wanted.

    Raises:
        OSError: the file cannot be mapped.
    """
    found = _stored(e, list(offsets), sizes)
    if found is None:
        return None
    leaf, at = found
    size, count = leaf.dtype.itemsize, math.prod(sizes)
    start, stop = extent(leaf, at, sizes)
    if leaf.dtype != dtype or not count or start % size or stop - start != count * size:
        return None
    page = start - start % mmap.ALLOCATIONGRANULARITY
    with open(leaf.file, "rb") as file:
        mapped = mmap.mmap(file.fileno(), stop - page, access=mmap.ACCESS_COPY, offset=page)
    flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start - page)
    return flat.view(tuple(sizes))


def _stored(e: Expression, offsets: list[int], sizes: Sequence[int]) -> tuple[Stored, list[int]] | None:
    """The stored tensor that a box is a box of, and where; None if it is made of several, or computed."""
    if isinstance(e, Stored):
        return e, offsets
    if isinstance(e, Cut):
        return _stored(e.of, _moved(offsets, e.dim, e.start), sizes)
    if isinstance(e, Join):
        begin = 0
        for part in e.parts:
            end = begin + part.shape[e.dim]
            if begin <= offsets[e.dim] and offsets[e.dim] + sizes[e.dim] <= end:
                return _stored(part, _moved(offsets, e.dim, -begin), sizes)
            begin = end
    return None


def _moved(offsets: list[int], dim: int, by: int) -> list[int]:
    return [o + by if d == dim else o for d, o in enumerate(offsets)]

"""What collectives along a filled dimension move, as plain functions over `_c10d_functional`.

Of `size` positions each of `ranks` ranks holds `ceil(size / ranks)`, one run after the other. What is too
much on the last ranks repeats the last position: a real one, so that nothing is divided by zero there;
gradients are filled with zeros. `size` may be symbolic. Positions are picked by their numbers then, because a
number of missing positions, which may be 0 for some sizes and not for others, would be a guard.

``chunked`` asks for the form that Inductor knows (`chunk_collectives.py`), which is for some sizes only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import collective_moves as moves
from .send import Begun, begin_gather_rows, begin_reduce_scatter_rows


def scatter(
    x: Tensor, group: str, dim: int, ranks: int, *, zeros: bool = False, chunked: bool = False
) -> Tensor:
    """This rank's positions of the sum over the ranks; `zeros`: what is filled up is zero."""
    return begin_scatter(x, group, dim, ranks, zeros=zeros, chunked=chunked)()


def begin_scatter(
    x: Tensor, group: str, dim: int, ranks: int, *, zeros: bool = False, chunked: bool = False
) -> Begun:
    """Begins what `scatter` does."""
    if chunked and x.shape[dim] % ranks == 0:
        rows = x.contiguous() if dim == 0 else torch.cat(x.chunk(ranks, dim))
        return begin_reduce_scatter_rows(rows, ranks, group)
    shape, part = list(x.shape), _part(x.shape[dim], ranks)
    if not _fits(x.shape[dim], ranks):
        x = _pick(x, dim, torch.arange(ranks * part, device=x.device), zeros=zeros)
    pieces = x.reshape(*shape[:dim], ranks, part, *shape[dim + 1 :]).movedim(dim, 0)
    begun = begin_reduce_scatter_rows(pieces.contiguous(), ranks, group)
    return lambda: begun().squeeze(0)


def gather(x: Tensor, group: str, dim: int, ranks: int, size: int, *, chunked: bool = False) -> Tensor:
    """All positions, one behind the other, contiguous, without what was filled up."""
    return begin_gather(x, group, dim, ranks, size, chunked=chunked)()


def begin_gather(x: Tensor, group: str, dim: int, ranks: int, size: int, *, chunked: bool = False) -> Begun:
    """Begins what `gather` does."""
    shape = list(x.shape)
    begun = begin_gather_rows(x.contiguous(), ranks, group)
    if chunked and size % ranks == 0:
        return begun if dim == 0 else lambda: torch.cat(begun().chunk(ranks), dim)

    def gathered() -> Tensor:
        pieces = begun().view(ranks, *shape).movedim(0, dim)
        return _cut_off(pieces.reshape(*shape[:dim], ranks * shape[dim], *shape[dim + 1 :]), dim, ranks, size)

    return gathered


def take(x: Tensor, dim: int, ranks: int, index: int, *, zeros: bool = False) -> Tensor:
    """This rank's positions of a whole value."""
    part = _part(x.shape[dim], ranks)
    return _pick(x, dim, torch.arange(part, device=x.device) + index * part, zeros=zeros)


def pad(x: Tensor, dim: int, index: int, size: int) -> Tensor:
    """All positions, zero but for this rank's."""
    own = torch.arange(size, device=x.device) - index * x.shape[dim]
    here = (own >= 0).logical_and(own < x.shape[dim])
    return _mask(x.index_select(dim, own.clamp(0, x.shape[dim] - 1)), dim, here)


def enter(x: Tensor, group: str, src: int, dim: int, sizes: list[int], index: int) -> Tensor:
    """Parts of dimension `src`, of these sizes, become parts of the positions."""
    ranks = len(sizes)
    part = _part(x.shape[dim], ranks)
    if not _fits(x.shape[dim], ranks):
        x = _pick(x, dim, torch.arange(ranks * part, device=x.device))
    return moves.all_to_all(x, group, src, dim, sizes, [part] * ranks, index)


def leave(x: Tensor, group: str, src: int, dim: int, sizes: list[int], index: int, size: int) -> Tensor:
    """The reverse of `enter`, without what was filled up."""
    ranks = len(sizes)
    whole = moves.all_to_all(x, group, dim, src, [x.shape[dim]] * ranks, sizes, index)
    return _cut_off(whole, dim, ranks, size)


def _part(size: int, ranks: int) -> int:
    return (size + ranks - 1) // ranks


def _fits(size: int, ranks: int) -> bool:
    return isinstance(size, int) and size % ranks == 0


def _cut_off(whole: Tensor, dim: int, ranks: int, size: int) -> Tensor:
    if _fits(size, ranks):
        return whole.contiguous()  # with one position per rank it may be a view of what was received
    # A copy in any case: whether it is contiguous already depends on the size.
    return whole.narrow(dim, 0, size).clone(memory_format=torch.contiguous_format)


def _pick(x: Tensor, dim: int, at: Tensor, *, zeros: bool = False) -> Tensor:
    """The positions of these numbers; those beyond the end are the last one, or zeros."""
    size = x.shape[dim]
    picked = x.index_select(dim, at.clamp(max=size - 1))
    return _mask(picked, dim, at < size) if zeros else picked


def _mask(x: Tensor, dim: int, kept: Tensor) -> Tensor:
    return torch.where(kept.reshape([-1 if d == dim else 1 for d in range(x.dim())]), x, 0)

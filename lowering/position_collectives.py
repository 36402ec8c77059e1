"""Collectives along a dimension of any size (`S(1+)`), with their gradients; see `collectives.py`.

`x` is this rank's tensor, `group` a process group name, `dim` the divided dimension, `ranks` the number of
ranks in the group, `index` this rank's position in it, `size` the whole size of the dimension. Gradients of
positions that were filled up are zero, so that nothing of them is summed up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import position_moves as moves
from .collectives import _apply, _register, _same


@_register("(Tensor x, str group, int dim, int ranks, int index, bool chunked=False) -> Tensor")
def scatter_positions(
    x: Tensor, group: str, dim: int, ranks: int, index: int, chunked: bool = False
) -> Tensor:
    """`P -> S(dim+)`, gradient `S(dim+) -> R`: a reduce-scatter."""
    size = x.shape[dim]
    return _apply(
        x,
        lambda a: moves.scatter(a, group, dim, ranks, chunked=chunked),
        lambda grad: moves.gather(grad, group, dim, ranks, size, chunked=chunked),
    )


@_register(
    "(Tensor x, str group, int dim, int ranks, int index, SymInt size, bool partial, bool chunked=False) "
    "-> Tensor"
)
def gather_positions(
    x: Tensor,
    group: str,
    dim: int,
    ranks: int,
    index: int,
    size: int,
    partial: bool,
    chunked: bool = False,
) -> Tensor:
    """`S(dim+) -> R`, gradient `P -> S(dim+)` if it is `partial`, else `R -> S(dim+)`: an all-gather.

    Backward is a reduce-scatter where the ranks go on differently, and a slice where all go on alike.
    """
    return _apply(
        x,
        lambda a: moves.gather(a, group, dim, ranks, size, chunked=chunked),
        lambda grad: (
            moves.scatter(grad, group, dim, ranks, zeros=True, chunked=chunked)
            if partial
            else moves.take(grad, dim, ranks, index, zeros=True)
        ),
    )


@_register("(Tensor x, str group, int dim, int ranks, int index) -> Tensor")
def take_positions(x: Tensor, group: str, dim: int, ranks: int, index: int) -> Tensor:
    """`R -> S(dim+)`, gradient `S(dim+) -> R`: each rank takes its positions."""
    size = x.shape[dim]
    return _apply(
        x,
        lambda a: moves.take(a, dim, ranks, index),
        lambda grad: moves.gather(grad, group, dim, ranks, size),
    )


@_register("(Tensor x, int dim, int ranks, int index, SymInt size) -> Tensor")
def pad_positions(x: Tensor, dim: int, ranks: int, index: int, size: int) -> Tensor:
    """`S(dim+) -> P`, gradient `R -> S(dim+)`: zeros around this rank's positions."""
    return _apply(
        x,
        lambda a: moves.pad(a, dim, index, size),
        lambda grad: moves.take(grad, dim, ranks, index, zeros=True),
    )


@_register("(Tensor x, str group, int src_dim, int dim, int[] sizes, int index) -> Tensor")
def exchange_positions(x: Tensor, group: str, src_dim: int, dim: int, sizes: list[int], index: int) -> Tensor:
    """`S(src_dim) -> S(dim+)`, gradient the reverse: an all-to-all; `sizes` are those of `src_dim`."""
    size = x.shape[dim]
    return _apply(
        x,
        lambda a: moves.enter(a, group, src_dim, dim, sizes, index),
        lambda grad: moves.leave(grad, group, src_dim, dim, sizes, index, size),
    )


@_register("(Tensor(a) x, int index) -> Tensor(a)")
def gradient_once(x: Tensor, index: int) -> Tensor:
    """`R -> R`, gradient `R -> P`: the first rank keeps the gradient, the others have zeros."""
    return _apply(x, _same, _same if index == 0 else torch.zeros_like)

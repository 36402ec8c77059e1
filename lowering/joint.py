"""One collective of all simulated ranks as one function of their values, with its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .collectives import attained

ops = torch.ops.tpcompile
# Nothing is sent in forward; backward needs all ranks.
_GRADIENT_COMMUNICATES = (
    ops.copy_to_ranks.default,
    ops.copy_all_to_ranks.default,
    ops.take_shard.default,
    ops.take_positions.default,
)
# Along a dimension that is filled up.
_POSITIONS = (
    ops.scatter_positions.default,
    ops.gather_positions.default,
    ops.take_positions.default,
    ops.exchange_positions.default,
)
_SEVERAL = {
    ops.copy_all_to_ranks.default: ops.copy_to_ranks.default,
    ops.all_reduce_together.default: ops.all_reduce.default,
}
"""Those of several tensors, and what they are of each."""
COLLECTIVES = frozenset(
    (
        ops.all_reduce.default,
        ops.all_reduce_together.default,
        ops.extreme.default,
        ops.all_gather.default,
        ops.reduce_scatter.default,
        ops.all_to_all.default,
        *_POSITIONS,
        *_GRADIENT_COMMUNICATES,
    )
)
"""The calls that need all ranks, forward or backward."""


def joint(target: Any, loaded: list[Any]) -> list[Any]:
    """One collective of all members of a group: what each of them gets, with gradients."""
    if target in _SEVERAL:
        several = [[(x, group) for x in xs] for xs, group in loaded]
        copies = [joint(_SEVERAL[target], list(same)) for same in zip(*several, strict=True)]
        return [list(own) for own in zip(*copies, strict=True)]
    return list(_Joint.apply(target, [args[1:] for args in loaded], *(args[0] for args in loaded)))


class _Joint(torch.autograd.Function):
    """A collective as one function of all members' values; its transpose is that of ``collectives.py``."""

    @staticmethod
    def forward(ctx: Any, target: Any, options: list[Any], *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.target, ctx.options = target, options
        if target in (ops.scatter_positions.default, ops.take_positions.default):
            ctx.options = [[*o, xs[0].shape[o[1]]] for o in options]
        if target is ops.exchange_positions.default:
            ctx.options = [[*o, xs[0].shape[o[2]]] for o in options]
        if target is ops.extreme.default:
            whole = _reduce(list(xs), options[0][1])
            given = [(*o[2:], *(None, (), True)[len(o) - 2 :]) for o in options]
            ctx.options = [(x, among, whole, *how) for x, (among, *how) in zip(xs, given, strict=True)]
        return tuple(x.contiguous().clone() for x in _forward(target, options, list(xs)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, None, *_backward(ctx.target, ctx.options, list(grads)))


def _forward(target: Any, options: list[Any], xs: list[Tensor]) -> list[Tensor]:
    if target is ops.copy_to_ranks.default:
        return xs
    if target is ops.all_reduce.default:
        return [_reduce(xs, "sum")] * len(xs)
    if target is ops.extreme.default:
        return [_reduce(xs, options[0][1])] * len(xs)
    if target is ops.all_gather.default:
        return [torch.cat(xs, options[0][1])] * len(xs)
    if target is ops.take_shard.default:
        return [_own(x, *o[1:]) for x, o in zip(xs, options, strict=True)]
    if target is ops.reduce_scatter.default:
        return [_own(_reduce(xs, "sum"), *o[1:]) for o in options]
    if target is ops.scatter_positions.default:
        return _filled_parts(_reduce(xs, "sum"), options[0][1], len(xs))
    if target is ops.take_positions.default:
        return [_filled_parts(x, options[0][1], len(xs))[i] for i, x in enumerate(xs)]
    if target is ops.exchange_positions.default:
        return _filled_parts(torch.cat(xs, options[0][1]), options[0][2], len(xs))
    if target is ops.gather_positions.default:
        _, dim, _, _, size, _ = options[0]
        return [torch.cat(xs, dim).narrow(dim, 0, size)] * len(xs)
    assert target is ops.all_to_all.default
    _, src, dst, _, sizes, _ = options[0]
    return list(torch.cat(xs, src).split(sizes, dst))


def _backward(target: Any, options: list[Any], grads: list[Tensor]) -> list[Tensor]:
    if target is ops.copy_to_ranks.default:
        return [_reduce(grads, "sum")] * len(grads)
    if target is ops.all_reduce.default:
        return grads
    if target is ops.extreme.default:
        counts = [attained(*o) for o in options]
        return [g * n / sum(counts) for g, n in zip(grads, counts, strict=True)]
    if target is ops.all_gather.default:
        return [_own(g, *o[1:]) for g, o in zip(grads, options, strict=True)]
    if target in (ops.take_shard.default, ops.reduce_scatter.default):
        return [torch.cat(grads, options[0][1])] * len(grads)
    if target in (ops.scatter_positions.default, ops.take_positions.default):
        # What was filled up has no gradient: this is checked here, where all of it is seen.
        _, dim, _, _, size = options[0]
        whole = torch.cat(grads, dim)
        assert not whole.narrow(dim, size, whole.shape[dim] - size).any()
        return [whole.narrow(dim, 0, size)] * len(grads)
    if target is ops.gather_positions.default:
        _, dim, _, _, _, partial = options[0]
        wholes = [_reduce(grads, "sum")] * len(grads) if partial else grads
        return [_zero_parts(g, dim, len(grads))[i] for i, g in enumerate(wholes)]
    if target is ops.exchange_positions.default:
        _, src, dim, sizes, _, size = options[0]
        return list(torch.cat(grads, dim).narrow(dim, 0, size).split(sizes, src))
    _, src, dst, sizes, _, _ = options[0]
    return list(torch.cat(grads, dst).split(sizes, src))


def _filled_parts(whole: Tensor, dim: int, ranks: int) -> list[Tensor]:
    """Equal parts; the last position is repeated as often as needed."""
    last = whole.narrow(dim, whole.shape[dim] - 1, 1)
    part = math.ceil(whole.shape[dim] / ranks)
    filled = torch.cat([whole, *[last] * (part * ranks - whole.shape[dim])], dim)
    return list(filled.split(part, dim))


def _zero_parts(whole: Tensor, dim: int, ranks: int) -> list[Tensor]:
    """Equal parts; zeros at the end."""
    part = math.ceil(whole.shape[dim] / ranks)
    missing = part * ranks - whole.shape[dim]
    zeros = torch.zeros_like(whole.narrow(dim, 0, 1))
    return list(torch.cat([whole, *[zeros] * missing], dim).split(part, dim))


def _reduce(xs: list[Tensor], op: str) -> Tensor:
    stacked = torch.stack(xs)
    how: dict[str, Any] = {"sum": stacked.sum, "max": stacked.amax, "min": stacked.amin}
    reduced: Tensor = how[op](0).to(xs[0].dtype)
    return reduced


def _own(x: Tensor, dim: int, sizes: list[int], index: int) -> Tensor:
    return x.split(sizes, dim)[index]

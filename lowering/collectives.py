"""Collectives as fx call targets, `torch.ops.tpcompile.<name>.default`, with gradients that TP needs.

Every operator here is linear in its tensor (`extreme` apart), so that its backward needs no saved tensor:
it is the transposed movement of data, chosen by the placement of the gradient. torch's own formulas
can't be used, because they do not know that placement (its all-reduce is its own backward, which
multiplies gradients by the number of ranks).

The operators are CompositeImplicitAutograd: Dynamo and fx keep one node per operator, and AOTAutograd
decomposes it into `_c10d_functional` operators and views, forward and backward, under grad mode, no_grad
and inference mode alike. Inductor therefore only sees operators that it knows, and no meta kernel of
ours can disagree with the real one.

`x` is this rank's local tensor, `group` a process group name, `sizes` the local size of the divided
dimension on every rank of the group (uneven or 0 allowed), `index` this rank's position in the group.
Everything that depends on the rank is an argument, although the group could be asked: torch caches
compiled programs by node and arguments, and ranks share that cache.

Sources: the f and g operators of Megatron-LM (Shoeybi et al. 2019), sequence parallelism (Korthikanti
et al. 2022), and the pairs of value and gradient placements of JAX's shard_map (`pvary`, `psum`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import collective_moves as moves
from .first_derivatives import once

_LIBRARY = torch.library.Library("tpcompile", "FRAGMENT")

Move = Callable[[Tensor], Tensor]


class _Linear(torch.autograd.Function):
    """A linear movement of data and its transpose, as plain functions that issue functional collectives."""

    @staticmethod
    def forward(x: Tensor, move: Move, transposed: Move) -> Tensor:
        return move(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Move, Move], output: Tensor) -> None:
        ctx.transposed = inputs[2]
        ctx.set_materialize_grads(False)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transposed(grad), None, None


def _apply(x: Tensor, move: Move, transposed: Move) -> Tensor:
    # Without a gradient the plain function is enough, and saves eager mode the detour.
    if not (torch.is_grad_enabled() and x.requires_grad):
        return move(x)
    y: Tensor = _Linear.apply(x, move, transposed)
    return y


def _register(arguments: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a python function as the torch operator of the same name."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(function.__name__ + arguments, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(function.__name__, function, "CompositeImplicitAutograd")
        return function

    return register


@_register("(Tensor x, str group) -> Tensor")
def all_reduce(x: Tensor, group: str) -> Tensor:
    """`P(sum) -> R`, gradient `R -> R`: Megatron's g. Shape unchanged.

    Every rank uses the whole result in the same way, so the gradient is whole on every rank already.
    """
    return _apply(x, lambda a: moves.reduce(a, group, "sum"), _same)


@_register("(Tensor[] xs, str group) -> Tensor[]")
def all_reduce_together(xs: Sequence[Tensor], group: str) -> list[Tensor]:
    """`all_reduce` of several tensors of one type in one message; a result without gradient gives none."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in xs):
        return list(_Together.apply(group, *xs))
    return list(_Together.forward(group, *xs))


class _Together(torch.autograd.Function):
    """Sums of several tensors over the ranks, each with a gradient of its own."""

    @staticmethod
    def forward(group: str, *xs: Tensor) -> tuple[Tensor, ...]:
        flat = [x.flatten() for x in xs]
        pieces = moves.reduce(torch.cat(flat), group, "sum").split([f.shape[0] for f in flat])
        return tuple(piece.reshape(x.shape).clone() for piece, x in zip(pieces, xs, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *grads


@_register("(Tensor x, str group, str op, Tensor? among=None, int[] dims=[], bool equal_nan=True) -> Tensor")
def extreme(
    x: Tensor,
    group: str,
    op: str,
    among: Tensor | None = None,
    dims: Sequence[int] = (),
    equal_nan: bool = True,
) -> Tensor:
    """`P(op) -> R`, gradient `R -> P(op)`, of "max" or "min". Shape unchanged. NaN if any rank has NaN.

    The gradient goes to the ranks whose `x` is the result, in proportion to how many elements attain it
    there: torch divides it evenly over all of them. These are counted in `among`, of which `x` is the extreme
    over `dims`; without it each rank counts once.

    Args:
        x: this rank's extreme.
        group: the group's name.
        op: "max" or "min".
        among: what it was taken of, of the same number of dimensions or with `dims` more.
        dims: the dimensions that were reduced.
        equal_nan: NaN attains NaN, as in torch's `max()`; in its `amax` nothing does: gradients are NaN.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return moves.reduce(x, group, op)
    y: Tensor = _Extreme.apply(x, among, group, op, tuple(dims), equal_nan)
    return y


class _Extreme(torch.autograd.Function):
    """A maximum or minimum over ranks."""

    @staticmethod
    def forward(
        x: Tensor, among: Tensor | None, group: str, op: str, dims: tuple[int, ...], equal_nan: bool
    ) -> Tensor:
        return moves.reduce(x, group, op)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, among, ctx.group, _, ctx.dims, ctx.equal_nan = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, among, output)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        x, among, whole = ctx.saved_tensors
        mine = attained(x, among, whole, ctx.dims, ctx.equal_nan).to(
            torch.promote_types(grad.dtype, torch.float)
        )
        share = mine / moves.reduce(mine, ctx.group, "sum")
        return (grad * share).to(grad.dtype), None, None, None, None, None


def attained(
    x: Tensor, among: Tensor | None, whole: Tensor, dims: tuple[int, ...], equal_nan: bool
) -> Tensor:
    """How many of this rank's elements are the extreme of all ranks', in the extreme's shape."""

    def equal(a: Tensor, b: Tensor) -> Tensor:
        return (a == b) | (a.isnan() & b.isnan()) if equal_nan else a == b

    if among is None:
        return equal(x, whole)
    reduced = sorted(d % among.ndim for d in dims)
    own = x
    for dim in reduced if x.ndim < among.ndim else ():
        own = own.unsqueeze(dim)
    count = equal(among, own).sum(reduced, keepdim=True) if reduced else equal(among, own)
    return count.reshape(x.shape) * equal(x, whole)


@_register("(Tensor(a) x, str group) -> Tensor(a)")
def copy_to_ranks(x: Tensor, group: str) -> Tensor:
    """`R -> R`, gradient `P -> R`: Megatron's f, JAX's `pvary`. Shape unchanged.

    Forward is a view, which compiled code drops; ranks use the value differently, so gradients add up.
    """
    return _apply(x, _same, lambda grad: moves.reduce(grad, group, "sum"))


@_register("(Tensor x, str group, int dim, int[] sizes, int index) -> Tensor")
def all_gather(x: Tensor, group: str, dim: int, sizes: list[int], index: int) -> Tensor:
    """`S(dim) -> R`, gradient `R -> S(dim)`: size `sizes[index]` of `dim` becomes `sum(sizes)`.

    For a result that every rank uses in the same way (logits): backward takes this rank's slice.
    """
    return _apply(
        x,
        lambda a: moves.gather(a, group, dim, sizes, index),
        lambda grad: moves.own_slice(grad, dim, sizes, index),
    )


@_register("(Tensor x, str group, int dim, int[] sizes, int index) -> Tensor")
def reduce_scatter(x: Tensor, group: str, dim: int, sizes: list[int], index: int) -> Tensor:
    """`P -> S(dim)`, gradient `S(dim) -> R`: size `sum(sizes)` of `dim` becomes `sizes[index]`.

    Sequence parallelism's g: the sum is divided, and each rank's part of it needs the whole gradient.
    """
    return _apply(
        x,
        lambda a: moves.reduce_scatter(a, group, dim, sizes, index),
        lambda grad: moves.gather(grad, group, dim, sizes, index),
    )


@_register("(Tensor(a) x, str group, int dim, int[] sizes, int index) -> Tensor(a)")
def take_shard(x: Tensor, group: str, dim: int, sizes: list[int], index: int) -> Tensor:
    """`R -> S(dim)`, gradient `S(dim) -> R`: size `sum(sizes)` of `dim` becomes `sizes[index]`.

    Forward is a slice (a view, maybe not contiguous); backward gathers what the ranks' slices gave.
    """
    return _apply(
        x,
        lambda a: moves.own_slice(a, dim, sizes, index),
        lambda grad: moves.gather(grad, group, dim, sizes, index),
    )


@_register("(Tensor(a) x, int index) -> Tensor(a)")
def keep_first(x: Tensor, index: int) -> Tensor:
    """`R -> P`, gradient `R -> R`: rank 0 keeps the value, the others hold zeros. Shape unchanged.

    The sum over the ranks is `x`, so the whole gradient is x's gradient, on every rank: Megatron's g
    used early. (The true transpose, zeros on the others, would leave a gradient that is Partial.)
    """
    return _apply(x, _same if index == 0 else torch.zeros_like, _same)


@_register("(Tensor(a) x, int dim, int[] sizes, int index) -> Tensor(a)")
def pad_shard(x: Tensor, dim: int, sizes: list[int], index: int) -> Tensor:
    """`S(dim) -> P`, gradient `R -> S(dim)`: zeros around x; `sizes[index]` of `dim` becomes `sum(sizes)`.

    The sum over the ranks is the whole value, so backward takes this rank's slice of the whole gradient.
    """
    return _apply(
        x,
        lambda a: moves.zero_pad(a, dim, sizes, index),
        lambda grad: moves.own_slice(grad, dim, sizes, index),
    )


@_register(
    "(Tensor x, str group, int src_dim, int dst_dim, int[] src_sizes, int[] dst_sizes, int index) -> Tensor"
)
def all_to_all(
    x: Tensor, group: str, src_dim: int, dst_dim: int, src_sizes: list[int], dst_sizes: list[int], index: int
) -> Tensor:
    """`S(src_dim) -> S(dst_dim)`, gradient the reverse; x is local in `src_dim` and whole in `dst_dim`.

    Result: `sum(src_sizes)` in `src_dim` and `dst_sizes[index]` in `dst_dim` (as in DeepSpeed-Ulysses).
    """
    return _apply(
        x,
        lambda a: moves.all_to_all(a, group, src_dim, dst_dim, src_sizes, dst_sizes, index),
        lambda grad: moves.all_to_all(grad, group, dst_dim, src_dim, dst_sizes, src_sizes, index),
    )


def _same(x: Tensor) -> Tensor:
    # A fresh view, not x: the caller may not tell an operator's result from its input otherwise.
    return x.view_as(x)

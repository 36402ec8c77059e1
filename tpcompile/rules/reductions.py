"""Rules of reductions and of operators that need a whole dimension (softmax, norms, sorts, scans)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from tpcompile.ir.nodes import op_name, operands, option, results, shape
from tpcompile.ir.sizes import sizes_of

from .labels import labelled, resized
from .rule import UNARY, Labels, Letters, Rule, letters_of

# How a divided dimension is completed. Not here, because ranks would need more than one number of each
# other: var, std, logsumexp, norms, argmax; prod has no collective; max with a dim also returns positions.
_REDUCE = {"sum": "sum", "mean": "sum", "count_nonzero": "sum"}
EXTREMES = {"amax": "max", "amin": "min", "max": "max", "min": "min"}
"""Reductions to the largest or least element; those that also return its position want all of a dimension."""


def reduced_dims(node: Node) -> list[int]:
    """The dimensions that a reduction is over: those named, or all."""
    rank = len(shape(operands(node)[0]))
    dim = option(node, "dim")
    if dim is None or dim == []:
        return list(range(rank))
    # A number has a dimension 0 for torch, but nothing to reduce.
    return [d % rank for d in (dim if isinstance(dim, list | tuple) else [dim])] if rank else []


def reduction(node: Node) -> Rule:
    """sum, mean, amax, amin over given dimensions: a divided one leaves a partial result.

    A divided ``mean`` becomes a local sum divided by the whole count (uneven parts count right).
    Other reductions (var, argmax, prod, ...) want their dimensions whole.
    """
    letters, source = labelled(node)
    dims = set(reduced_dims(node))
    keep = len(sizes_of(results(node)[0])) == len(source)
    target: Labels = tuple(() if i in dims else d for i, d in enumerate(source) if keep or i not in dims)
    name = op_name(node)
    gone = [letter for i in sorted(dims) for letter in source[i]]
    how = _how(node)
    return Rule(
        inputs=(source,),
        outputs=tuple(target for _ in results(node)),
        sizes=letters.sizes,
        whole=frozenset() if how else frozenset(gone),
        reduce=dict.fromkeys(gone, how) if how else {},
        linear=UNARY if name in ("sum", "mean") and _keeps_summands(node) else (),
        nonempty=how in ("max", "min"),
        localize="mean" if name == "mean" else "",
    )


def _how(node: Node) -> str:
    name = op_name(node)
    if name in EXTREMES and len(results(node)) == 1:
        return EXTREMES[name]
    return _REDUCE.get(name, "")


def whole_dim(name: str = "dim", linear: bool = False) -> Callable[[Node], Rule]:
    """A maker of rules for operators that keep their operand's shape and want the named dimensions whole."""

    def rule(node: Node) -> Rule:
        letters, source = labelled(node)
        dims = _named(node, name, len(source))
        return Rule(
            inputs=tuple(source for _ in operands(node)),
            outputs=tuple(source for _ in results(node)),
            sizes=letters.sizes,
            whole=letters_of([source[d] for d in dims]),
            linear=UNARY if linear and _keeps_summands(node) else (),
        )

    return rule


def _keeps_summands(node: Node) -> bool:
    """Whether a summand is the same in the result's type: whole numbers would lose each one's fraction."""
    old, new = operands(node)[0].meta["val"].dtype, results(node)[0].dtype
    return torch.promote_types(old, new) == new


def _named(node: Node, name: str, rank: int) -> list[int]:
    """Dimensions that an option names; all of them if it names none (``roll``), the last if it has none."""
    dims: Any = option(node, name, -1)
    found = dims if isinstance(dims, list | tuple) else [dims]
    return [d % rank for d in found] if found and rank else list(range(rank))


def changed_dims(linear: bool = False) -> Callable[[Node], Rule]:
    """Like ``whole_dim`` for operators that change the size of these dimensions (topk, diff, fft)."""

    def rule(node: Node) -> Rule:
        dims = _named(node, "dim", len(shape(operands(node)[0])))
        # MKL refuses empty tensors.
        return resized(node, dims, linear=linear, nonempty="fft" in op_name(node))

    return rule


def layer_norm(node: Node) -> Rule:
    """The normalised dimensions are whole; weight and bias go with them."""
    letters = Letters()
    ops = operands(node)
    source = letters.dims(shape(ops[0]))
    tail = source[len(source) - len(option(node, "normalized_shape")) :]
    outputs: list[Labels] = [source]
    for extra in results(node)[1:]:
        outputs.append(tuple(d if s != 1 else () for d, s in zip(source, sizes_of(extra), strict=True)))
    return Rule(
        inputs=(source, *(tail for _ in ops[1:])),
        outputs=tuple(outputs),
        sizes=letters.sizes,
        whole=letters_of(tail),
    )


def group_norm(node: Node) -> Rule | str:
    """``group_norm(x[b, (g c), ...], groups)``: groups may be divided, channels within one not."""
    letters = Letters()
    ops = operands(node)
    batch, channels, *space = shape(ops[0])
    groups = option(node, "num_groups")
    b, g, c, *rest = letters.dims((batch, groups, channels // groups, *space))
    source = (b, g + c, *rest)
    return Rule(
        inputs=(source, *((g + c,) for _ in ops[1:])),
        outputs=(source,),
        sizes=letters.sizes,
        whole=letters_of((c, *rest)),
        nonempty=True,
        localize="group_norm",
    )


def own_statistics(node: Node) -> Rule | str:
    """Batch norm by the statistics of its operand: per channel, all else is whole."""
    if not option(node, "training"):
        return "running statistics are used, but not updated"
    letters = Letters()
    ops = operands(node)
    source = letters.dims(shape(ops[0]))
    channel = source[1]
    return Rule(
        inputs=(source, *((channel,) for _ in ops[1:])),
        outputs=(source, *((channel,) for _ in results(node)[1:])),
        sizes=letters.sizes,
        whole=letters_of((source[0], *source[2:])),
        nonempty=True,
    )


def batch_norm(node: Node) -> Rule | str:
    """Inference-mode batch norm: per channel, everything else follows."""
    if option(node, "training", False):
        return "statistics of a divided batch are not supported"
    letters = Letters()
    ops = operands(node)
    source = letters.dims(shape(ops[0]))
    statistics = [letters.dims(sizes_of(r)) for r in results(node)[1:]]  # empty in inference
    return Rule(
        inputs=(source, *((source[1],) for _ in ops[1:])),
        outputs=(source, *statistics),
        sizes=letters.sizes,
        whole=letters_of(d for dims in statistics for d in dims),
        fixed=frozenset(range(1, len(results(node)))),
        nonempty=True,
    )


def histogram(node: Node) -> Rule:
    """``histc``: what falls into each bin may be counted by parts, if the bins are given."""
    letters, source = labelled(node)
    bins = letters.dims(shape(node))
    given = option(node, "min", 0) < option(node, "max", 0)
    counted = letters_of(source)
    return Rule(
        (source,),
        (bins,),
        letters.sizes,
        whole=letters_of(bins) | (frozenset() if given else counted),
        reduce=dict.fromkeys(sorted(counted), "sum") if given else {},
    )


def cross_entropy(node: Node) -> Rule:
    """``cross_entropy_loss(x[n v ...], target[n ...])``: classes are whole.

    A mean counts only the targets that are not ignored, so its samples are whole too.
    """
    letters = Letters()
    x, target, *weight = operands(node)
    source = letters.dims(shape(x))
    at = 1 if len(source) > 1 else 0
    samples = source[:at] + source[at + 1 :]
    probabilities = len(shape(target)) == len(source)
    how = option(node, "reduction", 1)
    outputs = (samples if how == 0 else (),)
    return Rule(
        (source, source if probabilities else samples, *((source[at],) for _ in weight)),
        outputs,
        letters.sizes,
        whole=frozenset(source[at]) | (letters_of(samples) if how == 1 else frozenset()),
        reduce=dict.fromkeys(sorted(letters_of(samples)), "sum") if how == 2 else {},
    )


def elementwise_loss(node: Node) -> Rule | str:
    """``mse_loss`` and its like: pointwise, then nothing, a mean (whole) or a sum."""
    letters = Letters()
    a, b = (shape(o) for o in operands(node))
    if a != b:
        return "operands of a loss that broadcast"
    dims = letters.dims(a)
    how = option(node, "reduction", 1)
    return Rule(
        (dims, dims),
        (dims if how == 0 else (),),
        letters.sizes,
        whole=letters_of(dims) if how == 1 else frozenset(),
        reduce=dict.fromkeys(sorted(letters_of(dims)), "sum") if how == 2 else {},
    )

"""ExpandLosses: softmaxes and losses over classes that the ranks could share become sums over the classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tpcompile.ir.graph_edit import call_before, cast_before, drop_unused, replace
from tpcompile.ir.nodes import operands, option, results, shape
from tpcompile.planner.global_program import GlobalProgram, Pass
from tpcompile.planner.search.facts import descendants
from tpcompile.planner.search.must_divide import matrix, worth_dividing

aten = torch.ops.aten
MEAN, SUM = 1, 2
PREFIX = "classes of "
"""What the groups of this pass begin with, so that they are told from those of packed matmuls."""


@dataclass(frozen=True)
class ExpandLosses(Pass):
    """Replaces softmaxes and losses over classes by maxima, sums and look-ups, which ranks can share.

    ``log_softmax(x)`` becomes ``s - log(sum(exp(s)))`` with ``s = x - max(x)``, and a ``cross_entropy`` is of
    it what ``gather`` finds for each target. Ranks that hold some of the classes then send numbers per token,
    instead of all logits. Fires where the classes are a dimension of a weight, and for the groups that are
    named (the planner tries which ones pay): all such calls over the classes of one weight.
    """

    name = "expand-losses"
    groups: frozenset[str] = frozenset()

    def apply(self, program: GlobalProgram) -> bool:
        if not any(group.startswith(PREFIX) for group in self.groups):
            return False
        found = [node for group, node in _expandable(program) if group in self.groups]
        old = set(program.graph.nodes)
        for node in found:
            replace(node, _EXPAND[node.target](node))
        _share(node for node in program.graph.nodes if node not in old)
        program.split_groups |= self.groups
        return drop_unused(program.graph) or bool(found)


def loss_groups(program: GlobalProgram) -> list[str]:
    """The groups that could be expanded, in the graph's order."""
    return list(dict.fromkeys(group for group, _ in _expandable(program)))


def _expandable(program: GlobalProgram) -> Iterator[tuple[str, Node]]:
    """Softmaxes and losses over a dimension of a weight, which nothing else in the program wants whole."""
    found = [node for node in program.graph.nodes if node.target in _EXPAND and _expands(node)]
    if not found:
        return
    factors, params = program.factors(), program.params()
    below = descendants(program.graph, set(params))
    # What comes from no weight, such as a one-hot matrix of labels, is whole on every rank anyway.
    others = {node for node in factors.rules if node not in below}
    candidates = worth_dividing(factors, set(params)) - factors.stuck_atoms(besides=others.union(found))
    for node in found:
        x = operands(node)[0]
        atoms = candidates.intersection(factors.atoms(x, _dim(node, x)))
        holders = (
            name for n, name in params.items() if matrix(n) and atoms & set(factors.places(n).values())
        )
        if atoms and (holder := min(holders, default=None)) is not None:
            yield PREFIX + holder, node


def _expands(node: Node) -> bool:
    """Whether it is over one dimension, and only its first result is used; others are notes for backward."""
    one_dim = node.target is not aten.logsumexp.default or len(_dims(node)) == 1
    one_result = isinstance(node.meta["val"], torch.Tensor) or all(u.args[1] == 0 for u in node.users)
    return one_dim and one_result


def _dim(node: Node, x: Node) -> int:
    """The dimension of the classes."""
    rank = len(shape(x))
    if node.target in _LOSSES:
        return min(rank - 1, 1)
    return int(_dims(node)[0]) % rank


def _dims(node: Node) -> Sequence[int]:
    named = option(node, "dim")
    return named if isinstance(named, list | tuple) else [named]


def _share(new: Iterable[Node]) -> None:
    """Computes once what several of the calls need, such as the maximum of the same logits."""
    first: dict[tuple[Any, str], Node] = {}
    for node in new:
        same = first.setdefault((node.target, repr((node.args, node.kwargs))), node)
        if same is not node:
            node.replace_all_uses_with(same)


# What the operators are made of. Half-precision numbers are added up in single precision, as torch does.


def _shifted(node: Node) -> tuple[Node, Node, int]:
    """A softmax's operand less its largest element, the sum of the exponentials, and the dimension."""
    x, top, dim = _maximum(node)
    shifted = call_before(node, aten.sub.Tensor, x, top)
    return shifted, _summed(node, call_before(node, aten.exp.default, shifted), dim, True), dim


def _widened(node: Node) -> Node:
    """The operand, in the type that is added up in."""
    x = operands(node)[0]
    return cast_before(
        node, x, torch.promote_types(option(node, "dtype") or x.meta["val"].dtype, torch.float32)
    )


def _maximum(node: Node) -> tuple[Node, Node, int]:
    """The widened operand, its largest element, and the dimension.

    Nothing changes with what is subtracted: no gradient has to go through the maximum.
    """
    x = _widened(node)
    dim = _dim(node, x)
    return (
        x,
        call_before(node, aten.amax.default, call_before(node, aten.detach.default, x), [dim], True),
        dim,
    )


def _log_softmax(node: Node) -> Node:
    return cast_before(node, _log_probabilities(node)[0], results(node)[0].dtype)


def _log_probabilities(node: Node) -> tuple[Node, int]:
    shifted, total, dim = _shifted(node)
    return call_before(node, aten.sub.Tensor, shifted, call_before(node, aten.log.default, total)), dim


def _softmax(node: Node) -> Node:
    shifted, total, _ = _shifted(node)
    shares = call_before(node, aten.div.Tensor, call_before(node, aten.exp.default, shifted), total)
    return cast_before(node, shares, results(node)[0].dtype)


def _logsumexp(node: Node) -> Node:
    wide, top, dim = _maximum(node)
    infinite = call_before(node, aten.eq.Scalar, call_before(node, aten.abs.default, top), math.inf)
    top = call_before(node, aten.masked_fill.Scalar, top, infinite, 0)
    powers = call_before(node, aten.exp.default, call_before(node, aten.sub.Tensor, wide, top))
    log = call_before(node, aten.log.default, _summed(node, powers, dim, True))
    total = call_before(node, aten.add.Tensor, log, top)
    if not option(node, "keepdim", False):
        total = call_before(node, aten.squeeze.dim, total, dim)
    return cast_before(node, total, results(node)[0].dtype)


def _cross_entropy(node: Node) -> Node:
    x, target = operands(node)[:2]
    smoothing = option(node, "label_smoothing", 0.0)
    if len(shape(target)) == len(shape(x)) and target.meta["val"].dtype.is_floating_point:
        return _soft_labels(node, target, smoothing)
    if smoothing:
        logs, dim = _log_probabilities(node)
        losses = call_before(node, aten.neg.default, _picked(node, logs, target, dim))
        return _by_index(node, losses, _spread(node, logs, dim))
    shifted, total, dim = _shifted(node)
    log = call_before(node, aten.squeeze.dim, call_before(node, aten.log.default, total), dim)
    return _by_index(node, call_before(node, aten.sub.Tensor, log, _picked(node, shifted, target, dim)))


def _nll(node: Node) -> Node:
    x, target = _widened(node), operands(node)[1]
    return _by_index(node, call_before(node, aten.neg.default, _picked(node, x, target, _dim(node, x))))


def _picked(node: Node, x: Node, target: Node, dim: int) -> Node:
    """Each target's element of ``x``; of an ignored one that of the first class."""
    index = call_before(node, aten.unsqueeze.default, _safe(node, target), dim)
    return call_before(node, aten.squeeze.dim, call_before(node, aten.gather.default, x, dim, index), dim)


def _safe(node: Node, target: Node) -> Node:
    """The targets, of which ignored ones are the first class."""
    return call_before(
        node, aten.masked_fill.Scalar, cast_before(node, target, torch.int64), _ignored(node), 0
    )


def _ignored(node: Node) -> Node:
    return call_before(node, aten.eq.Scalar, operands(node)[1], option(node, "ignore_index", -100))


def _by_index(node: Node, losses: Node, spread: Node | None = None) -> Node:
    """Weighted losses of targets, none of ignored ones; a mean is over the weights.

    Args:
        node: the loss.
        losses: that of every target.
        spread: what label smoothing adds for all classes, weighted.
    """
    target, *weight = operands(node)[1:]
    ignored, how = _ignored(node), option(node, "reduction", MEAN)
    counts = call_before(node, aten.logical_not.default, ignored)
    counts = cast_before(node, counts, losses.meta["val"].dtype)
    if weight:
        each = call_before(node, aten.index.Tensor, weight[0], [_safe(node, target)])
        counts = call_before(node, aten.mul.Tensor, counts, each)
        losses = call_before(node, aten.mul.Tensor, losses, each)
    if spread is not None:
        smoothing = option(node, "label_smoothing", 0.0)
        losses = call_before(node, aten.mul.Tensor, losses, 1 - smoothing)
        losses = call_before(node, aten.add.Tensor, losses, spread)
    losses = call_before(node, aten.masked_fill.Scalar, losses, ignored, 0)
    if how in (MEAN, SUM):
        losses = call_before(node, aten.sum.default, losses)
    if how == MEAN:
        losses = call_before(node, aten.div.Tensor, losses, call_before(node, aten.sum.default, counts))
    return cast_before(node, losses, results(node)[0].dtype)


def _spread(node: Node, logs: Node, dim: int) -> Node:
    """What label smoothing adds: the losses of all classes, weighted, in equal shares."""
    total = _summed(node, _weighted(node, logs, dim), dim)
    share = option(node, "label_smoothing", 0.0) / _classes(logs, dim)
    return call_before(node, aten.mul.Tensor, total, -share)


def _classes(logs: Node, dim: int) -> int:
    classes = shape(logs)[dim]
    assert isinstance(classes, int), "a dimension of a weight"
    return classes


def _soft_labels(node: Node, target: Node, smoothing: float) -> Node:
    """The loss of targets that are probabilities: nothing is ignored, and a mean is over the samples."""
    logs, dim = _log_probabilities(node)
    if smoothing:
        target = call_before(node, aten.mul.Tensor, target, 1 - smoothing)
        target = call_before(node, aten.add.Tensor, target, smoothing / _classes(logs, dim))
    products = call_before(node, aten.mul.Tensor, _weighted(node, logs, dim), target)
    losses = call_before(node, aten.neg.default, _summed(node, products, dim))
    how = option(node, "reduction", MEAN)
    if how in (MEAN, SUM):
        losses = call_before(node, (aten.mean if how == MEAN else aten.sum).default, losses)
    return cast_before(node, losses, results(node)[0].dtype)


def _weighted(node: Node, logs: Node, dim: int) -> Node:
    """Log-probabilities times the weights of their classes."""
    weight = operands(node)[2:]
    if not weight:
        return logs
    sizes = [*shape(weight[0]), *[1] * (len(shape(logs)) - dim - 1)]
    return call_before(node, aten.mul.Tensor, logs, call_before(node, aten.view.default, weight[0], sizes))


def _summed(node: Node, value: Node, dim: int, keep: bool = False) -> Node:
    return call_before(node, aten.sum.dim_IntList, value, [dim], keep)


_LOSSES: dict[Any, Callable[[Node], Node]] = {
    aten.cross_entropy_loss.default: _cross_entropy,
    aten.nll_loss_forward.default: _nll,
    aten.nll_loss2d_forward.default: _nll,
}
_EXPAND: dict[Any, Callable[[Node], Node]] = {
    **_LOSSES,
    aten.log_softmax.int: _log_softmax,
    aten._log_softmax.default: _log_softmax,
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.logsumexp.default: _logsumexp,
}

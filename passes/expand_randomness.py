"""ExpandRandomness: operators that draw random numbers become functions of a seed."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from tpcompile.ir import random_numbers
from tpcompile.ir.graph_edit import call, drop_unused, fake_mode
from tpcompile.ir.nodes import arguments, operands, option, shape
from tpcompile.rules.randomness import is_random
from tpcompile.work import Work

from .pipeline import Pass

aten = torch.ops.aten
uniform = torch.ops.tpcompile.uniform.default


@dataclass(frozen=True)
class ExpandRandomness(Pass):
    """Replaces dropouts and the like by arithmetic on ``uniform(like, seed, stream)``.

    ``dropout(x)`` becomes ``x * (uniform(x) >= p) / (1 - p)``. Attention with a dropout becomes two matmuls
    with a softmax and such a mask between them: the fused kernels draw for themselves. The seed is put in
    when the graph is lowered. Operators that are not known here stay as they are.
    """

    name = "expand-randomness"

    def apply(self, work: Work) -> bool:
        found = [n for n in work.graph.nodes if is_random(n) and n.target in _EXPAND]
        streams = _Streams(work)
        for node in found:
            with work.graph.inserting_before(node):
                new = _EXPAND[node.target](streams, node)
            _replace(node, new)
        return drop_unused(work.graph) or bool(found)


def _replace(node: Node, new: tuple[Node, ...]) -> None:
    if isinstance(node.meta["val"], torch.Tensor):
        node.replace_all_uses_with(new[0])
        return
    for user in list(node.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(new[arguments(user)[1]])


@dataclass
class _Streams:
    """Adds calls, and numbers those that draw."""

    work: Work
    count: int = 0
    mode: Any = field(init=False)

    def __post_init__(self) -> None:
        self.mode = fake_mode(self.work.graph)

    def add(self, node: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A call that belongs where a node does."""
        return call(node.graph, target, args, kwargs, like=node, mode=self.mode)

    def draw(self, node: Node, like: Node) -> Node:
        """Uniform numbers in the shape of a value."""
        self.count += 1
        return self.add(node, uniform, like, None, self.count - 1, [])


def _dropped(to: _Streams, node: Node, x: Node, p: float) -> tuple[Node, Node]:
    """A value after dropout, and which elements were kept."""
    keep = to.add(node, aten.ge.Scalar, to.draw(node, x), p)
    masked = to.add(node, aten.mul.Tensor, x, keep)
    return to.add(node, aten.mul.Tensor, masked, 1 / (1 - p) if p < 1 else 0.0), keep


def _dropout(to: _Streams, node: Node) -> tuple[Node, ...]:
    x, p = arguments(node)[:2]
    return _dropped(to, node, x, p)


def _bernoulli(to: _Streams, node: Node) -> tuple[Node, ...]:
    x = arguments(node)[0]
    below = to.add(node, aten.lt.Tensor, to.draw(node, x), x)
    return (_typed(to, node, below),)


def _bernoulli_p(to: _Streams, node: Node) -> tuple[Node, ...]:
    x, p = arguments(node)[0], option(node, "p", 0.5)
    return (_typed(to, node, to.add(node, aten.lt.Scalar, to.draw(node, x), p)),)


def _rand_like(to: _Streams, node: Node) -> tuple[Node, ...]:
    return (_typed(to, node, to.draw(node, arguments(node)[0])),)


def _randn_like(to: _Streams, node: Node) -> tuple[Node, ...]:
    return (_typed(to, node, _normal(to, node, to.draw(node, arguments(node)[0]))),)


def _rand(to: _Streams, node: Node) -> tuple[Node, ...]:
    return (_typed(to, node, to.draw(node, _empty(to, node))),)


def _randn(to: _Streams, node: Node) -> tuple[Node, ...]:
    return (_typed(to, node, _normal(to, node, to.draw(node, _empty(to, node)))),)


def _empty(to: _Streams, node: Node) -> Node:
    val = node.meta["val"]
    return to.add(node, aten.full.default, arguments(node)[0], 0, dtype=val.dtype, device=val.device)


def _normal(to: _Streams, node: Node, numbers: Node) -> Node:
    """Normal numbers by the inverse of their distribution, at the middles between uniform ones."""
    step = 2.0**-random_numbers.BITS
    spread = to.add(node, aten.mul.Tensor, numbers, 2.0)
    centred = to.add(node, aten.add.Tensor, spread, step - 1)
    inverse = to.add(node, aten.erfinv.default, centred)
    return to.add(node, aten.mul.Tensor, inverse, math.sqrt(2))


def _typed(to: _Streams, node: Node, value: Node) -> Node:
    dtype = node.meta["val"].dtype
    if value.meta["val"].dtype == dtype:
        return value
    return to.add(node, aten._to_copy.default, value, dtype=dtype)


def _attention(to: _Streams, node: Node) -> tuple[Node, ...]:
    """Attention in its parts; softmax and mask in float32 at least, as torch's own composite does it."""
    q, k, v, *mask = operands(node)
    p, scale = option(node, "dropout_p", 0.0), option(node, "scale")
    repeats = shape(q)[-3] // shape(k)[-3] if option(node, "enable_gqa", False) else 1
    if repeats != 1:
        k, v = (to.add(node, aten.repeat_interleave.self_int, x, int(repeats), -3) for x in (k, v))
    scale = 1 / math.sqrt(int(shape(q)[-1])) if scale is None else scale
    turned = to.add(node, aten.transpose.int, k, -2, -1)
    scores = to.add(node, aten.matmul.default, to.add(node, aten.mul.Tensor, q, scale), turned)
    if option(node, "is_causal", False):
        mask = [_causal(to, node, q, k)]
    for each in mask:
        scores = _masked(to, node, scores, each)
    dtype = torch.promote_types(q.meta["val"].dtype, torch.float32)
    weights = to.add(node, aten._safe_softmax.default, scores, -1, dtype)
    kept, _ = _dropped(to, node, weights, p)
    rounded = (
        kept
        if dtype == v.meta["val"].dtype
        else to.add(node, aten._to_copy.default, kept, dtype=v.meta["val"].dtype)
    )
    return (to.add(node, aten.matmul.default, rounded, v),)


def _masked(to: _Streams, node: Node, scores: Node, mask: Node) -> Node:
    if mask.meta["val"].dtype == torch.bool:
        hidden = to.add(node, aten.logical_not.default, mask)
        return to.add(node, aten.masked_fill.Scalar, scores, hidden, -math.inf)
    return to.add(node, aten.add.Tensor, scores, mask)


def _causal(to: _Streams, node: Node, q: Node, k: Node) -> Node:
    sizes = [to.add(node, aten.sym_size.int, x, x.meta["val"].ndim - 2) for x in (q, k)]
    device = q.meta["val"].device
    ones = to.add(node, aten.full.default, sizes, True, dtype=torch.bool, device=device)
    return to.add(node, aten.tril.default, ones)


_EXPAND: dict[Any, Callable[[_Streams, Node], tuple[Node, ...]]] = {
    aten.dropout.default: _dropout,
    aten.native_dropout.default: _dropout,
    aten.bernoulli.default: _bernoulli,
    aten.bernoulli.p: _bernoulli_p,
    aten.rand_like.default: _rand_like,
    aten.randn_like.default: _randn_like,
    aten.rand.default: _rand,
    aten.randn.default: _randn,
    aten.scaled_dot_product_attention.default: _attention,
}

"""ExpandRandomness: operators that draw random numbers become functions of a seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tpcompile.ir import random_numbers
from tpcompile.ir.graph_edit import call_before, cast_before, replace
from tpcompile.ir.nodes import arguments, operands, option, results, shape
from tpcompile.planner.global_program import GlobalProgram, Pass
from tpcompile.rules.randomness import is_random

aten = torch.ops.aten
uniform = torch.ops.tpcompile.uniform.default


@dataclass(frozen=True)
class ExpandRandomness(Pass):
    """Replaces dropouts and the like by arithmetic on ``uniform(like, seed, stream)``.

    ``dropout(x)`` becomes ``x * (uniform(x) >= p) / (1 - p)``. Attention with a dropout becomes two matmuls
    with a softmax and such a mask between them: the fused kernels draw for themselves. The seed is put in
    when the graph is lowered. Operators that are not known here, and complex numbers, stay as they are.
    """

    name = "expand-randomness"

    def apply(self, program: GlobalProgram) -> bool:
        found = [
            n for n in program.graph.nodes if is_random(n) and n.target in _EXPAND and not _is_complex(n)
        ]
        for node in found:
            replace(node, *_EXPAND[node.target](node))
        for number, node in enumerate(program.graph.find_nodes(op="call_function", target=uniform)):
            like, seed, _, parts = arguments(node)
            node.args = (like, seed, number, parts)
        return bool(found)


def _is_complex(node: Node) -> bool:
    return results(node)[0].dtype.is_complex  # one draw gives a real number


def _draw(node: Node, like: Node) -> Node:
    """Uniform numbers in the shape of a value; they are numbered when all are there."""
    return call_before(node, uniform, like, None, 0, [])


def _dropped(node: Node, x: Node, p: float) -> tuple[Node, Node]:
    """A value after dropout, and which elements were kept."""
    keep = call_before(node, aten.ge.Scalar, _draw(node, x), p)
    masked = call_before(node, aten.mul.Tensor, x, keep)
    return call_before(node, aten.mul.Tensor, masked, 1 / (1 - p) if p < 1 else 0.0), keep


def _dropout(node: Node) -> tuple[Node, ...]:
    x, p = arguments(node)[:2]
    return _dropped(node, x, p)


def _bernoulli(node: Node) -> tuple[Node, ...]:
    x = arguments(node)[0]
    below = call_before(node, aten.lt.Tensor, _draw(node, x), x)
    return (_typed(node, below),)


def _bernoulli_p(node: Node) -> tuple[Node, ...]:
    x, p = arguments(node)[0], option(node, "p", 0.5)
    return (_typed(node, call_before(node, aten.lt.Scalar, _draw(node, x), p)),)


def _rand_like(node: Node) -> tuple[Node, ...]:
    return (_typed(node, _draw(node, arguments(node)[0])),)


def _randn_like(node: Node) -> tuple[Node, ...]:
    return (_typed(node, _normal(node, _draw(node, arguments(node)[0]))),)


def _rand(node: Node) -> tuple[Node, ...]:
    return (_typed(node, _draw(node, _empty(node))),)


def _randn(node: Node) -> tuple[Node, ...]:
    return (_typed(node, _normal(node, _draw(node, _empty(node)))),)


def _empty(node: Node) -> Node:
    val = node.meta["val"]
    return call_before(node, aten.full.default, arguments(node)[0], 0, dtype=val.dtype, device=val.device)


def _normal(node: Node, numbers: Node) -> Node:
    """Normal numbers by the inverse of their distribution, at the middles between uniform ones."""
    step = 2.0**-random_numbers.BITS
    spread = call_before(node, aten.mul.Tensor, numbers, 2.0)
    centred = call_before(node, aten.add.Tensor, spread, step - 1)
    inverse = call_before(node, aten.erfinv.default, centred)
    return call_before(node, aten.mul.Tensor, inverse, math.sqrt(2))


def _typed(node: Node, value: Node) -> Node:
    return cast_before(node, value, node.meta["val"].dtype)


def _attention(node: Node) -> tuple[Node, ...]:
    """Attention in its parts; softmax and mask in float32 at least, as torch's own composite does it."""
    q, k, v, *mask = operands(node)
    p, scale = option(node, "dropout_p", 0.0), option(node, "scale")
    repeats = shape(q)[-3] // shape(k)[-3] if option(node, "enable_gqa", False) else 1
    if repeats != 1:
        k, v = (call_before(node, aten.repeat_interleave.self_int, x, int(repeats), -3) for x in (k, v))
    scale = 1 / math.sqrt(int(shape(q)[-1])) if scale is None else scale
    turned = call_before(node, aten.transpose.int, k, -2, -1)
    scores = call_before(node, aten.matmul.default, call_before(node, aten.mul.Tensor, q, scale), turned)
    if option(node, "is_causal", False):
        mask = [_causal(node, q, k)]
    for each in mask:
        scores = _masked(node, scores, each)
    dtype = torch.promote_types(q.meta["val"].dtype, torch.float32)
    weights = call_before(node, aten._safe_softmax.default, scores, -1, dtype)
    kept, _ = _dropped(node, weights, p)
    rounded = cast_before(node, kept, v.meta["val"].dtype)
    return (call_before(node, aten.matmul.default, rounded, v),)


def _masked(node: Node, scores: Node, mask: Node) -> Node:
    if mask.meta["val"].dtype == torch.bool:
        hidden = call_before(node, aten.logical_not.default, mask)
        return call_before(node, aten.masked_fill.Scalar, scores, hidden, -math.inf)
    return call_before(node, aten.add.Tensor, scores, mask)


def _causal(node: Node, q: Node, k: Node) -> Node:
    sizes = [call_before(node, aten.sym_size.int, x, x.meta["val"].ndim - 2) for x in (q, k)]
    device = q.meta["val"].device
    ones = call_before(node, aten.full.default, sizes, True, dtype=torch.bool, device=device)
    return call_before(node, aten.tril.default, ones)


_EXPAND: dict[Any, Callable[[Node], tuple[Node, ...]]] = {
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

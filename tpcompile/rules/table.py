"""The table of rules: operator -> one line of notation, or a function for irregular operators.

Look-up goes by the overload (``aten.add.Tensor``), then by the operator (``aten.add``); any operator
that torch tags as pointwise needs no row. An operator without a rule is replicated and reported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch.fx import Node

from ..errors import TpCompileError
from . import contractions, indexing, pointwise, reductions, views
from .notation import instantiate, parse_row
from .rule import Rule, operands, results, shape, sizes_of

RuleMaker = Callable[[Node], Rule | str]

_LINEAR = "... k, n k, n? -> ... n; once 2; linear 0,2; contraction"

ROWS: dict[str, str | RuleMaker] = {
    # Matmuls.
    "aten.linear": _LINEAR,
    "aten.mm": "i k, k n -> i n; linear 0|1; contraction",
    "aten.mv": "i k, k -> i; linear 0|1; contraction",
    "aten.bmm": "b i k, b k n -> b i n; linear 0|1; contraction",
    "aten.addmm": "n, i k, k n -> i n; once 0; linear 0,1|0,2; contraction",
    "aten.dot": "k, k -> ; linear 0|1; contraction",
    "aten.matmul": contractions.matmul,
    "aten.baddbmm": contractions.baddbmm,
    "aten.einsum": contractions.einsum,
    "aten.scaled_dot_product_attention": contractions.attention,
    # One matmul per group of sorted rows: rows and groups stay together.
    "aten._grouped_mm": "t k, e k n, e? -> t n; whole t e; linear 0; contraction",
    "transformers.grouped_mm_fallback": "t k, e k n, e? -> t n; whole t e; linear 0; contraction",
    # A divided vocabulary is looked up where it lies; other ranks contribute zeros.
    "aten.embedding": "v d, ... -> ... d; contraction; localize lookup",
    **dict.fromkeys(
        ("aten.convolution", "aten.conv1d", "aten.conv2d", "aten.conv3d",
         "aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d"),
        contractions.convolution,
    ),
    **dict.fromkeys(
        ("aten.max_pool2d", "aten.avg_pool2d", "aten.avg_pool1d", "aten.max_pool1d", "aten.adaptive_avg_pool2d",
         "aten.adaptive_avg_pool1d", "aten._adaptive_avg_pool2d", "aten.max_pool2d_with_indices",
         "aten.upsample_nearest2d", "aten.upsample_bilinear2d", "aten.upsample_bicubic2d",
         "aten.upsample_nearest1d"),
        contractions.spatial,
    ),
    # Rearrangements.
    **dict.fromkeys(
        ("aten.view", "aten._unsafe_view", "aten.reshape", "aten.flatten", "aten.unflatten"), views.view
    ),
    **dict.fromkeys(("aten.permute", "aten.transpose", "aten.t"), views.permute),
    **dict.fromkeys(("aten.squeeze", "aten.unsqueeze"), views.keep_sized_dims),
    **dict.fromkeys(
        ("aten.clone", "aten.alias", "aten.contiguous", "aten.detach", "aten.detach_",
         "aten.lift_fresh_copy"),
        views.same_shape,
    ),
    **dict.fromkeys(("aten.expand", "aten.expand_as"), views.expand),
    "aten.repeat": views.repeat,
    "aten.repeat_interleave.self_int": views.repeat_interleave,
    # Parts.
    "aten.slice": indexing.slice_,
    "aten.narrow": indexing.slice_,
    "aten.select": indexing.select,
    **dict.fromkeys(
        ("aten.split", "aten.split_with_sizes", "aten.chunk", "aten.unbind", "aten.unsafe_split",
         "aten.unsafe_chunk"),
        indexing.split,
    ),
    "aten.cat": indexing.cat,
    "aten.stack": indexing.stack,
    **dict.fromkeys(("aten.pad", "aten.constant_pad_nd"), indexing.resized),
    "aten.roll": indexing.roll,
    "aten.flip": indexing.flip,
    "aten.index_select": indexing.index_select,
    "aten.index": indexing.index,
    "aten.index_put": indexing.index_put,
    "aten.slice_scatter": indexing.slice_scatter,
    "aten.select_scatter": indexing.select_scatter,
    **dict.fromkeys(
        ("aten.gather", "aten.scatter", "aten.scatter_add", "aten.scatter_reduce"), indexing.gather_scatter
    ),
    # Reductions and whole dimensions.
    **dict.fromkeys(
        ("aten.sum", "aten.mean", "aten.amax", "aten.amin", "aten.max.dim", "aten.min.dim", "aten.var",
         "aten.std", "aten.prod", "aten.any", "aten.all", "aten.argmax", "aten.argmin", "aten.logsumexp",
         "aten.linalg_vector_norm", "aten.norm"),
        reductions.reduction,
    ),
    **dict.fromkeys(
        ("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax", "aten.cumsum",
         "aten.cumprod", "aten.sort", "aten.argsort", "aten.logcumsumexp"),
        reductions.whole_dim(1),
    ),
    "aten.topk": reductions.changed_dim(2),
    "aten.diff": reductions.changed_dim(2),
    "aten.layer_norm": reductions.layer_norm,
    "aten.native_layer_norm": reductions.layer_norm,
    "aten.rms_norm": reductions.layer_norm,
    "aten.group_norm": reductions.group_norm,
    "aten.batch_norm": reductions.batch_norm,
    "aten._native_batch_norm_legit_no_training": reductions.batch_norm,
    # Written out of order by torch's tags, but pointwise.
    **dict.fromkeys(
        ("aten._to_copy", "aten.to", "aten.type_as", "aten.masked_fill", "aten.where", "aten.dropout",
         "aten.silu", "aten.gelu", "aten.softplus", "aten.zeros_like", "aten.ones_like", "aten.full_like",
         "aten.empty_like", "aten.copy", "aten.prelu", "aten.addcmul", "aten.lerp", "aten.clamp",
         "aten.__and__", "aten.__or__", "aten.leaky_relu", "aten.relu6", "aten.selu",
         "aten.square", "aten.mish", "aten.logaddexp"),
        pointwise.broadcast,
    ),
}

_USER: dict[str, str | RuleMaker] = {}


def register_rule(op: torch._ops.OpOverload | torch._ops.OpOverloadPacket | str, rule: str | RuleMaker) -> None:
    """Adds or replaces the rule of an operator.

    Args:
        op: the operator, its packet, or its name such as ``"mylib.scan"`` or ``"mylib.scan.default"``.
        rule: a line of the notation (``tpcompile/rules/notation.py``), or a function from the fx node
            to a ``Rule``, or to a string that says why there is none for these shapes.

    Raises:
        TpCompileError: the line does not follow the notation.
    """
    if isinstance(rule, str):
        parse_row(rule)
    _USER[op if isinstance(op, str) else str(op)] = rule


def _names(node: Node) -> list[str]:
    if not isinstance(node.target, torch._ops.OpOverload):
        return [f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', node.target)}"]
    full = str(node.target)
    return [full, full.rpartition(".")[0]]


def rule_of(node: Node) -> Rule | str:
    """The rule of a call node, or the reason why it has none (it is then replicated)."""
    names = _names(node)
    for table in (_USER, ROWS):
        for name in names:
            if name in table:
                return _apply(table[name], node)
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        return _apply(pointwise.broadcast, node)
    return f"no rule for {names[0]}"


def _apply(row: str | RuleMaker, node: Node) -> Rule | str:
    if not isinstance(row, str):
        rule = row(node)
    else:
        rule = instantiate(parse_row(row), [shape(o) for o in operands(node)], [sizes_of(r) for r in results(node)])
    if isinstance(rule, Rule):
        _check(rule, node)
    return rule


def _check(rule: Rule, node: Node) -> None:
    """A rule that does not describe the node's shapes is an error in the rule, not in the model."""
    shapes = [shape(o) for o in operands(node)] + [sizes_of(r) for r in results(node)]
    labels = [*rule.inputs, *rule.outputs]
    for sizes, dims in zip(shapes, labels, strict=False):
        if len(sizes) != len(dims) or len(shapes) != len(labels):
            raise TpCompileError(
                f"the rule of {node.target} does not fit its shapes {shapes}",
                where=str(rule),
                todo="correct the rule (tpcompile.register_rule)",
            )
        for size, dim in zip(sizes, dims, strict=True):
            product = cast(int, 1)
            for letter in dim:
                product = product * rule.sizes[letter]
            if product != size:
                raise TpCompileError(f"in the rule of {node.target}, {dim} is no factorisation of {size}", where=str(rule))

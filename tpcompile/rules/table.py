"""The table of rules: operator -> one line of notation, or a function for irregular operators.

Look-up goes by the overload (``aten.add.Tensor``), then by the operator (``aten.add``); any operator
that torch tags as pointwise needs no row. An operator without a rule is replicated and reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import Function
from torch.fx import Node

from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.check import checked, short
from tpcompile.ir.nodes import find_operator, operands, results, shape
from tpcompile.ir.sizes import sizes_of
from tpcompile.ir.torch_internals import OpOverload, OpOverloadPacket

from . import contractions, indexing, kernels, opaque, parts, pointwise, quantised, reductions, views
from .notation import instantiate, parse_row
from .randomness import is_random
from .rule import Rule
from .well_formed import refuse_misfit, without_useless

RuleMaker = Callable[[Node], Rule | str]
Row = str | RuleMaker


def _rows(row: Row, *operators: str) -> dict[str, Row]:
    """The same row for several operators of aten."""
    return {f"aten.{name}": row for words in operators for name in words.split()}


def refuse(why: str) -> RuleMaker:
    """A row that says why there is no rule: the operator is always computed whole."""
    return lambda _: why


_DATA_DEPENDENT = "its result's shape depends on the data"
_GROUPED = "t k, e k n, e? -> t n; whole t e; linear 0; contraction; localize grouped_matmul"

MATMULS: dict[str, Row] = {
    "aten.linear": "... k, n k, n? -> ... n; once 2; linear 0,2; contraction",
    # Taken apart, these would become a loop over time steps, of as many as the example has.
    **_rows(refuse("its state is needed whole at every time step"), "lstm gru rnn_tanh rnn_relu"),
    "aten.bilinear": "... i, ... j, n i j, n? -> ... n; once 3; contraction",
    "aten.mm": "i k, k n -> i n; linear 0|1; contraction",
    "aten._int_mm": "i k, k n -> i n; contraction",
    "aten._scaled_mm": contractions.scaled_matmul,
    "aten.mv": "i k, k -> i; linear 0|1; contraction",
    "aten.bmm": "b i k, b k n -> b i n; linear 0|1; contraction",
    "aten.dot": "k, k -> ; linear 0|1; contraction",
    "aten.matmul": contractions.matmul,
    "aten.linalg_solve_triangular": contractions.triangular_solve,
    **_rows(contractions.add_matmul, "addmm addmv baddbmm"),
    "aten.einsum": contractions.einsum,
    "aten.scaled_dot_product_attention": contractions.attention,
    # One matmul per group of sorted rows: rows and groups stay together.
    "aten._grouped_mm": _GROUPED,
    "transformers.grouped_mm_fallback": _GROUPED,
    "aten.embedding": contractions.embedding,
    **_rows(contractions.embedding_bag, "_embedding_bag _embedding_bag_forward_only"),
    "aten._cdist_forward": "... i d, ... j d -> ... i j; whole d; contraction",
    **_rows(
        contractions.convolution,
        "convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
    ),
    **_rows(
        contractions.spatial,
        "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices",
        "avg_pool1d avg_pool2d avg_pool3d",
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d",
        "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d",
        "upsample_nearest1d upsample_nearest2d upsample_nearest3d",
        "_upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d",
        "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d",
        "_upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    ),
    **_rows("b c h w, b i j t -> b c i j; whole h w t; linear 0", "grid_sampler_2d grid_sampler"),
}

REARRANGEMENTS: dict[str, Row] = {
    **_rows(views.view, "view _unsafe_view reshape flatten unflatten"),
    "aten.view.dtype": refuse("it reads the bits of numbers as other numbers"),
    "aten.as_strided": refuse("it reads memory by strides, whatever the dimensions"),
    **_rows(views.permute, "permute transpose t"),
    **_rows(views.keep_sized_dims, "squeeze unsqueeze"),
    **_rows(views.same_shape, "clone alias contiguous detach lift_fresh_copy resolve_conj resolve_neg"),
    **_rows(views.expand, "expand expand_as"),
    "aten.repeat": views.repeat,
    "aten.repeat_interleave.self_int": views.repeat_interleave,
    "aten.repeat_interleave": refuse(_DATA_DEPENDENT),
    "aten.view_as_complex": "... t -> ...; whole t; linear 0",
    "aten.view_as_real": "... -> ... t; whole t; linear 0",
    "aten.glu": views.glu,
    **_rows(views.windows, "im2col col2im"),
    **_rows(views.pixel_shuffle, "pixel_shuffle pixel_unshuffle"),
    "tpcompile.ir.markers.keep_whole": views.kept_whole,
    **_rows(views.create, "new_zeros new_ones new_full new_empty"),
}

PARTS: dict[str, Row] = {
    **_rows(parts.slice_, "slice narrow"),
    **_rows(parts.select, "select unbind"),
    **_rows(parts.split, "split split_with_sizes chunk unsafe_split unsafe_split_with_sizes unsafe_chunk"),
    "aten.cat": parts.cat,
    "aten.stack": parts.stack,
    **_rows(parts.pad, "pad constant_pad_nd"),
    **_rows(reductions.whole_dim("dims", linear=True), "roll flip"),
    "aten.unfold": parts.unfold,
    "aten.diagonal": parts.diagonal,
    **_rows("... i j -> ... i j; whole i j; linear 0", "tril triu"),
    "aten.meshgrid": parts.meshgrid,
    "aten.index_select": indexing.index_select,
    "aten.index": indexing.index,
    **_rows(indexing.index_put, "index_put _unsafe_index_put"),
    "aten._unsafe_index": indexing.index,
    "aten.gather": indexing.gather,
    **_rows(indexing.scatter, "scatter scatter_add scatter_reduce"),
    **_rows(indexing.scatter_rows, "index_add index_copy"),
    "aten.index_fill": indexing.fill_rows,
    "aten.slice_scatter": indexing.slice_scatter,
    "aten.select_scatter": indexing.select_scatter,
    "aten.one_hot": "... -> ... c; whole c",
    "aten.bucketize.Tensor": "..., n -> ...; whole n",
    "aten.searchsorted.Tensor": "... n, ... m -> ... m; whole n",
    **_rows(refuse(_DATA_DEPENDENT), "nonzero masked_select unique_dim _unique2 bincount where.default"),
    "aten.masked_scatter": indexing.masked_scatter,
}

REDUCTIONS: dict[str, Row] = {
    **_rows(
        reductions.reduction,
        "sum mean amax amin aminmax max.dim min.dim max.default min.default prod any all count_nonzero",
        "_is_all_true",
        "var std var_mean std_mean argmax argmin logsumexp linalg_vector_norm norm",
    ),
    **_rows(
        reductions.whole_dim(),
        "softmax _softmax _safe_softmax log_softmax _log_softmax",
        "cumprod logcumsumexp cummax cummin sort argsort",
    ),
    "aten.cumsum": reductions.whole_dim(linear=True),
    "aten.topk": reductions.changed_dims(),
    **_rows(reductions.changed_dims(linear=True), "diff _fft_r2c _fft_c2c _fft_c2r"),
    "aten.histc": reductions.histogram,
    **_rows(reductions.layer_norm, "layer_norm native_layer_norm rms_norm _fused_rms_norm"),
    "aten.group_norm": reductions.group_norm,
    **_rows(reductions.batch_norm, "batch_norm _native_batch_norm_legit_no_training"),
    **_rows(
        reductions.own_statistics, "_native_batch_norm_legit.no_stats _native_batch_norm_legit_functional"
    ),
    "aten.cross_entropy_loss": reductions.cross_entropy,
    **_rows(reductions.elementwise_loss, "mse_loss smooth_l1_loss huber_loss"),
}

# Pointwise although torch does not tag it, or with a meaning of its own.
POINTWISE: dict[str, Row] = {
    **_rows(
        pointwise.broadcast,
        "_to_copy to fill masked_fill where complex polar copy dropout native_dropout feature_dropout",
        "rsub.Tensor real imag _conj isin.Tensor_Scalar __and__ __or__ __xor__",
        "zeros_like ones_like full_like empty_like hardswish leaky_relu log_sigmoid floor_divide",
    ),
    "aten.type_as": pointwise.type_as,
    "aten.prelu": pointwise.prelu,
}

OURS: dict[str, Row] = {
    opaque.NAME: opaque.opaque_module,
    "tpcompile.autograd_function": kernels.autograd_function,
    "tpcompile.uniform": pointwise.broadcast,
    **quantised.ROWS,
}

ROWS: dict[str, Row] = {
    **{**MATMULS, **REARRANGEMENTS, **PARTS, **REDUCTIONS, **POINTWISE},
    **{**OURS, **kernels.ROWS},
}

_USER: dict[str, Row] = {}


@checked
def register_rule(
    op: OpOverload | OpOverloadPacket | str | type[Function], rule: str | Callable[..., Any]
) -> None:
    """Adds or replaces the rule of an operator, or of a function of autograd.

    Args:
        op: the operator, its packet, or its name such as ``"mylib.scan"`` or ``"mylib.scan.default"``; or a
            ``torch.autograd.Function``, whose operands are the tensors that ``apply`` is given. Its forward
            and backward then run on a rank's parts.
        rule: a line of the notation (``tpcompile/rules/notation.py``), or a function from the fx node
            to a ``Rule``, or to a string that says why there is none for these shapes.

    Raises:
        TpCompileError: there is no such operator; the line does not follow the notation.
    """
    function = isinstance(op, type) and issubclass(op, Function)
    name = f"{op.__module__}.{op.__qualname__}" if function else str(op)  # type: ignore[union-attr]
    if not function:
        operator_of(op, "register_rule")
    if isinstance(rule, str):
        parse_row(rule)
    _USER[name] = rule


def operator_of(op: object, where: str) -> OpOverload | OpOverloadPacket:
    """The operator that is meant.

    Raises:
        TpCompileError: there is none of this name.
    """
    found = find_operator(op) if isinstance(op, str) else op
    if not isinstance(found, OpOverload | OpOverloadPacket):
        todo = 'define it first; names are as in "mylib.scan" or "mylib.scan.default"'
        raise TpCompileError(f"there is no operator {op!r}", where=where, todo=todo)
    return found


def user_rows() -> dict[str, Row]:
    """What ``register_rule`` was given, by operator."""
    return dict(_USER)


def rule_of(node: Node) -> Rule | str:
    """The rule of a call node, or the reason why it has none (it is then replicated).

    Raises:
        TpCompileError: the rule does not describe the node's shapes.
    """
    if is_random(node):
        return "it draws random numbers"
    names = _names(node.target)
    if names[-1] == "tpcompile.autograd_function":
        names.insert(0, kernels.function_name(node))
    row = _look_up(node.target, names)
    if row is None:
        return f"no rule for {names[0]}"
    where, todo = names[0], "correct the rule (tpcompile.register_rule)"
    with refusing("the rule of an operator failed", where=where, todo=todo):
        rule = row(node) if not isinstance(row, str) else _instantiate(row, node)
    if isinstance(rule, str):
        return rule
    if not isinstance(rule, Rule):
        raise TpCompileError(f"the rule of an operator returned {short(rule)}", where=where, todo=todo)
    refuse_misfit(rule, node)
    return without_useless(rule, node)


def has_rule(op: OpOverload) -> bool:
    """Whether the table says something of an operator, if only why it has no rule."""
    return _look_up(op, _names(op)) is not None


def _names(op: object) -> list[str]:
    if not isinstance(op, OpOverload):
        return [f"{getattr(op, '__module__', '')}.{getattr(op, '__name__', op)}"]
    full = str(op)
    return [full, full.rpartition(".")[0]]


def _look_up(op: object, names: Iterable[str]) -> Row | None:
    for table in (_USER, ROWS):
        for name in names:
            if name in table:
                return table[name]
    if isinstance(op, OpOverload) and torch.Tag.pointwise in op.tags:
        return pointwise.broadcast
    return None


def _instantiate(row: str, node: Node) -> Rule | str:
    return instantiate(parse_row(row), list(map(shape, operands(node))), list(map(sizes_of, results(node))))

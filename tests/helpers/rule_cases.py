"""Example calls for every row of the rule table: every dimension has its own size, some are odd.

Dimensions that the tests are about are even, so that a rule that is missing can be looked for on two
ranks; on three ranks nearly all of them divide unevenly.
"""

from __future__ import annotations

import math

import torch
import transformers.integrations.moe  # noqa: F401 (registers transformers.grouped_mm_fallback)

import tests.helpers.flash_attention  # noqa: F401 (registers its operators)
from tests.helpers.check_rule import (
    ascending,
    boolean,
    broken,
    bytes_,
    complex_,
    distinct,
    ints,
    large,
    real,
    signed,
    single,
    tied,
    unknown,
)
from tpcompile.runtime.verify.rule_program import Case, Operand

aten = torch.ops.aten


def _values(op: object, *args: object, **kwargs: object) -> Case:
    """A case of an operator whose values alone are compared (it has no gradient that means anything)."""
    return Case(op, args, dict(kwargs), gradients=False)  # type: ignore[arg-type]


def _case(op: object, *args: object, **kwargs: object) -> Case:
    return Case(op, args, dict(kwargs))  # type: ignore[arg-type]


_SAME = signed(6, 10)
_SQUARE = signed(6, 6)
_TRIANGLES = Operand((4, 6, 6), lambda s: torch.randn(s) + 4 * torch.eye(6))  # well conditioned
_OFFSETS = Operand((2,), lambda _: torch.tensor([4, 14], dtype=torch.int32))
_EIGHT = (
    Operand((6, 10), lambda s: torch.randn(s).to(torch.float8_e4m3fn)),
    Operand((10, 14), lambda s: torch.randn(s[::-1]).to(torch.float8_e4m3fn).t()),
)
_STATISTICS = (None, None, None, None)

MATMULS = [
    _case(aten.linear.default, signed(4, 3, 10), signed(14, 10), signed(14)),
    _case(aten.linear.default, signed(6, 10), signed(14, 10)),
    _case(aten.linear.default, signed(10), signed(14, 10), signed(14)),
    _case(aten.bilinear.default, signed(4, 10), signed(4, 6), signed(14, 10, 6), signed(14)),
    _case(aten.bilinear.default, signed(4, 3, 10), signed(4, 3, 6), signed(14, 10, 6)),
    _case(aten.mm.default, signed(6, 10), signed(10, 14)),
    _case(aten.mv.default, signed(6, 10), signed(10)),
    _values(aten._int_mm.default, bytes_(6, 10), bytes_(10, 14)),
    _values(aten._scaled_mm.default, *_EIGHT, single(), single(1), out_dtype=torch.float32),
    _values(
        aten._scaled_mm.default, *_EIGHT, single(6, 1), single(1, 14), single(14), out_dtype=torch.float32
    ),
    _case(aten.bmm.default, signed(4, 6, 10), signed(4, 10, 14)),
    _case(aten.addmm.default, signed(14), signed(6, 10), signed(10, 14)),
    _case(aten.addmm.default, signed(6, 14), signed(6, 10), signed(10, 14), beta=0.5, alpha=2.0),
    _case(aten.addmm.default, signed(6, 1), signed(6, 10), signed(10, 14)),
    _case(aten.dot.default, signed(10), signed(10)),
    _case(aten.linalg_solve_triangular.default, _TRIANGLES, signed(4, 6, 10), upper=False),
    _case(
        aten.linalg_solve_triangular.default, signed(6, 6), signed(4, 6, 10), upper=True, unitriangular=True
    ),
    _case(aten.linalg_solve_triangular.default, _TRIANGLES, signed(14, 1, 10, 6), upper=False, left=False),
    _case(aten.matmul.default, signed(4, 1, 6, 10), signed(14, 10, 22)),
    _case(aten.matmul.default, signed(4, 14, 6, 10), signed(14, 10, 22)),
    _case(aten.matmul.default, signed(10), signed(4, 10, 22)),
    _case(aten.matmul.default, signed(4, 6, 10), signed(10)),
    _case(aten.matmul.default, signed(4, 6, 10), signed(10, 22)),
    _case(aten.matmul.default, _SQUARE, _SQUARE),
    _case(aten.baddbmm.default, signed(4, 6, 14), signed(4, 6, 10), signed(4, 10, 14), beta=0.5),
    _case(aten.baddbmm.default, signed(1, 14), signed(4, 6, 10), signed(4, 10, 14)),
    _case(aten.einsum.default, "bqd,bkd->bqk", [signed(4, 6, 10), signed(4, 14, 10)]),
    _case(aten.einsum.default, "bq,kd->bd", [signed(4, 6), signed(14, 10)]),
    _case(aten.einsum.default, "...qhd,...khd->...hqk", [signed(3, 1, 6, 4, 10), signed(2, 14, 4, 10)]),
    _case(aten.einsum.default, "i...,ij", [signed(6, 4), signed(6, 10)]),
    _case(
        aten.scaled_dot_product_attention.default,
        signed(3, 4, 6, 10),
        signed(3, 4, 14, 10),
        signed(3, 4, 14, 22),
    ),
    _case(
        aten.scaled_dot_product_attention.default,
        signed(3, 4, 6, 10),
        signed(3, 4, 14, 10),
        signed(3, 4, 14, 22),
        signed(1, 1, 6, 14),
        scale=0.3,
    ),
    _case(
        aten.scaled_dot_product_attention.default,
        signed(3, 12, 6, 10),
        signed(3, 4, 14, 10),
        signed(3, 4, 14, 22),
        boolean(3, 1, 6, 14),
        enable_gqa=True,
    ),
    _case(
        aten.scaled_dot_product_attention.default,
        signed(3, 4, 6, 10),
        signed(3, 4, 14, 10),
        signed(3, 4, 14, 22),
        None,
        0.0,
        True,
    ),
    _case(aten.scaled_dot_product_attention.default, signed(4, 6, 10), signed(4, 14, 10), signed(4, 14, 22)),
    _case(aten.embedding.default, signed(14, 10), ints(14, 4, 6)),
    _case(aten.embedding.default, signed(14, 10), ints(14, 6), 9),
    _case(aten.embedding.default, signed(14, 10), ints(3, 4, 6), -1, True),
    _case(
        aten.embedding.default, broken(14, 10), Operand((6,), lambda _: torch.tensor([2, 3, 5, 7, 11, 12]))
    ),
    _values(
        aten._embedding_bag_forward_only.default,
        signed(14, 10),
        ints(14, 12),
        Operand((2,), lambda _: torch.tensor([0, 5])),
    ),
    _case(
        aten._embedding_bag.default,
        signed(14, 10),
        ints(14, 12),
        Operand((3,), lambda _: torch.tensor([0, 3, 7])),
    ),
    _case(
        aten._embedding_bag.default,
        signed(14, 10),
        ints(14, 12),
        Operand((2,), lambda _: torch.tensor([0, 5])),
        False,
        1,
    ),
    _case(
        aten.convolution.default, signed(4, 6, 10), signed(14, 6, 3), signed(14), [2], [1], [1], False, [0], 1
    ),
    _case(aten.convolution.default, signed(4, 18, 10), signed(12, 3, 2), None, [1], [0], [1], False, [0], 6),
    _case(aten.conv1d.default, signed(4, 12, 10), signed(12, 1, 4), signed(12), [1], [3], [1], 12),
    _case(aten.conv2d.default, signed(4, 6, 10, 8), signed(14, 6, 3, 3)),
    _case(aten.conv3d.default, signed(2, 4, 5, 6, 7), signed(6, 4, 3, 3, 3)),
    _case(aten.conv_transpose1d.default, signed(4, 6, 10), signed(6, 14, 3), signed(14)),
    _case(
        aten.conv_transpose2d.input, signed(4, 6, 10, 8), signed(6, 7, 3, 3), None, [1, 1], [0, 0], [0, 0], 2
    ),
    _case(aten.conv_transpose3d.input, signed(2, 4, 5, 6, 7), signed(4, 6, 3, 3, 3)),
    _case(torch.ops.transformers.grouped_mm_fallback.default, signed(14, 6), signed(2, 6, 10), _OFFSETS),
    _case(aten.addmv.default, signed(6), signed(6, 10), signed(10)),
    _case(aten._cdist_forward.default, signed(4, 6, 10), signed(4, 14, 10), 2.0, None),
]

RESAMPLING = [
    _values(aten.max_pool2d.default, signed(4, 6, 10, 8), [2, 2]),
    _values(aten.max_pool2d_with_indices.default, signed(4, 6, 10, 8), [2, 2]),
    _case(aten.avg_pool2d.default, signed(4, 6, 10, 8), [2, 2]),
    _case(aten.avg_pool1d.default, signed(4, 6, 10), [2]),
    _values(aten.max_pool1d.default, signed(4, 6, 10), [2]),
    _case(aten.adaptive_avg_pool2d.default, signed(4, 6, 10, 8), [5, 2]),
    _case(aten._adaptive_avg_pool2d.default, signed(4, 6, 10, 8), [5, 2]),
    _case(aten.adaptive_avg_pool1d.default, signed(4, 6, 10), [5]),
    _case(aten.adaptive_avg_pool1d.default, signed(6, 10), [5]),
    _case(aten.avg_pool1d.default, signed(6, 10), [3], [1], [1]),
    _values(aten.max_pool2d.default, signed(6, 10, 8), [3, 3], [1, 1], [1, 1]),
    _case(aten.upsample_nearest2d.default, signed(4, 6, 10, 8), [20, 24]),
    _case(aten.upsample_bilinear2d.default, signed(4, 6, 10, 8), [20, 24], False),
    _case(aten.upsample_bicubic2d.default, signed(4, 6, 10, 8), [20, 24], False),
    _case(aten.upsample_nearest1d.default, signed(4, 6, 10), [20]),
    _values(aten.max_pool3d.default, signed(4, 6, 4, 8, 2), [2, 2, 1]),
    _values(aten.max_pool3d_with_indices.default, signed(4, 6, 4, 8, 2), [2, 2, 1]),
    _case(aten.avg_pool3d.default, signed(4, 6, 4, 8, 2), [2, 2, 1]),
    _case(aten.adaptive_avg_pool3d.default, signed(4, 6, 4, 8, 2), [2, 2, 1]),
    _case(aten._adaptive_avg_pool3d.default, signed(4, 6, 4, 8, 2), [2, 2, 1]),
    _values(aten.adaptive_max_pool2d.default, signed(4, 6, 10, 8), [5, 2]),
    _case(aten.upsample_nearest2d.vec, signed(4, 6, 10, 8), None, [2.0, 2.0]),
    _case(aten.upsample_nearest3d.default, signed(4, 6, 2, 8, 10), [4, 16, 20]),
    _case(aten._upsample_nearest_exact1d.default, signed(4, 6, 10), [20]),
    _case(aten._upsample_nearest_exact2d.default, signed(4, 6, 10, 8), [20, 24]),
    _case(aten._upsample_nearest_exact3d.default, signed(4, 6, 2, 8, 10), [4, 16, 20]),
    _case(aten.upsample_linear1d.default, signed(4, 6, 10), [20], False),
    _case(aten.upsample_trilinear3d.default, signed(4, 6, 2, 8, 10), [4, 16, 20], False),
    _case(aten._upsample_bilinear2d_aa.default, signed(4, 6, 10, 8), [20, 24], False),
    _case(aten._upsample_bicubic2d_aa.default, signed(4, 6, 10, 8), [20, 24], False),
    _case(aten.grid_sampler_2d.default, signed(4, 6, 10, 8), real(4, 14, 22, 2), 0, 0, False),
    _case(aten.grid_sampler.default, signed(4, 6, 10, 8), real(4, 14, 22, 2), 0, 0, False),
]

VIEWS = [
    _case(aten.view.default, signed(4, 6, 30), [4, 6, 10, 3]),
    _case(aten.view.default, signed(4, 10, 6), [4, 60]),
    _case(aten.view.default, signed(4, 10, 6), [-1, 6]),
    _case(aten.view.default, signed(6, 10, 14), [60, 14]),
    _case(aten.view.default, signed(6, 35), [14, 15]),
    _case(aten._unsafe_view.default, signed(4, 6, 10), [24, 10]),
    _case(aten.reshape.default, signed(12, 10), [4, 30]),
    _case(aten.flatten.using_ints, signed(4, 6, 10, 3), 1, 2),
    _case(aten.unflatten.int, signed(4, 60), 1, [6, 10]),
    _case(aten.permute.default, signed(4, 6, 10), [2, 0, -2]),
    _case(aten.transpose.int, signed(4, 6, 10), 1, -1),
    _case(aten.t.default, signed(6, 10)),
    _case(aten.squeeze.dim, signed(4, 1, 10), 1),
    _case(aten.squeeze.dims, signed(1, 6, 1, 10), [0, 2]),
    _case(aten.unsqueeze.default, signed(4, 6), 1),
    _case(aten.clone.default, signed(4, 6)),
    _case(aten.alias.default, signed(4, 6)),
    _case(aten.contiguous.default, signed(4, 6)),
    _case(aten.detach.default, signed(4, 6)),
    _case(aten.lift_fresh_copy.default, signed(4, 6)),
    _case(aten.expand.default, signed(4, 1, 10), [3, 4, 6, 10]),
    _case(aten.expand.default, signed(4, 1, 10), [-1, 6, -1]),
    _case(aten.expand_as.default, signed(4, 1, 10), signed(4, 6, 10)),
    _case(aten.repeat.default, signed(4, 6), [3, 1, 2]),
    _case(aten.repeat_interleave.self_int, signed(4, 6), 3, 1),
    _case(aten.resolve_conj.default, complex_(4, 6)),
    _case(aten.resolve_neg.default, signed(4, 6)),
    _case(aten.view_as_complex.default, signed(4, 6, 2)),
    _case(aten.view_as_real.default, complex_(4, 6)),
    _case(aten.glu.default, signed(4, 12, 10), 1),
    _case(aten.glu.default, signed(4, 12)),
    _case(aten.im2col.default, signed(4, 6, 10, 8), [3, 1], [1, 1], [1, 0], [1, 1]),
    _case(aten.im2col.default, signed(6, 10, 8), [2, 2], [1, 1], [0, 0], [2, 2]),
    _case(aten.col2im.default, signed(4, 24, 20), [10, 8], [2, 2], [1, 1], [0, 0], [2, 2]),
    _case(aten.pixel_shuffle.default, signed(4, 24, 6, 10), 2),
    _case(aten.pixel_unshuffle.default, signed(4, 6, 12, 20), 2),
    _values(aten.new_zeros.default, signed(4, 6), [8, 10]),
    _values(aten.new_ones.default, signed(4, 6), [8, 10]),
    _values(aten.new_full.default, signed(4, 6), [8, 10], 2.5),
]

PARTS = [
    _case(aten.slice.Tensor, signed(6, 10), 1, 2, 8),
    _case(aten.slice.Tensor, signed(6, 10), 1, 1, 10, 2),
    _case(aten.slice.Tensor, signed(6, 12), 1, 0, 9223372036854775807, 2),
    _case(aten.slice.Tensor, signed(6, 10), 1, 0, -1, 2),
    _case(aten.slice.Tensor, signed(6, 10), 1, -9, 9223372036854775807, 2),
    _case(aten.slice.Tensor, signed(6, 10), 0, 0, 9223372036854775807),
    _case(aten.narrow.default, signed(6, 10), 1, 2, 4),
    _case(aten.select.int, signed(4, 6, 10), 1, -2),
    _case(aten.split.Tensor, signed(6, 20), 10, 1),
    _case(aten.split.Tensor, signed(6, 20), 8, -1),
    _case(aten.split_with_sizes.default, signed(6, 22), [4, 8, 10], 1),
    _case(aten.split_with_sizes.default, signed(6, 24), [8, 8, 8], 1),
    _case(aten.chunk.default, signed(6, 20), 2, 1),
    _case(aten.unbind.int, signed(4, 3, 10), 1),
    _case(aten.unsafe_split.Tensor, signed(6, 20), 10, 1),
    _case(aten.unsafe_chunk.default, signed(6, 20), 2, 1),
    _case(aten.cat.default, [signed(6, 10), signed(6, 4)], 1),
    _case(aten.cat.default, [_SAME, _SAME], -1),
    _case(aten.stack.default, [signed(6, 10), signed(6, 10)], 1),
    _case(aten.pad.default, signed(4, 6, 10), [1, 2]),
    _case(aten.pad.default, signed(4, 6, 10), [1, 2], "reflect"),
    _case(aten.constant_pad_nd.default, signed(4, 6, 10), [0, 0, 3, -3], 1.5),
    _case(aten.constant_pad_nd.default, signed(4, 6, 10), [0, 2]),
    _case(aten.roll.default, signed(4, 6, 10), [2], [1]),
    _case(aten.roll.default, signed(4, 6), [2]),
    _case(aten.flip.default, signed(4, 6, 10), [1]),
    _case(aten.index_select.default, signed(4, 6, 10), 1, ints(6, 14)),
    _case(aten.index_select.default, signed(4, 6, 10), 1, ints(6)),
    _case(aten.index.Tensor, signed(4, 6, 10), [None, ints(6, 14)]),
    _case(aten.index.Tensor, signed(4, 6, 10, 8), [ints(4, 14), None, ints(10, 14)]),
    _case(aten.index.Tensor, signed(4, 6, 10, 8), [None, ints(6, 14, 1), ints(10, 22)]),
    _case(aten.index.Tensor, signed(14, 10), [ints(14, 6)]),
    _case(aten.index_put.default, signed(14, 10), [distinct(14, 6)], signed(6, 10)),
    _case(aten.index_put.default, signed(14, 10), [ints(14, 6)], signed(6, 10), True),
    _case(aten.index_put.default, signed(14, 10), [ints(14, 6)], signed(), True),
    _case(aten.slice_scatter.default, signed(6, 10), signed(6, 4), 1, 2, 6),
    _case(aten.select_scatter.default, signed(4, 6, 10), signed(4, 10), 1, 3),
    _case(aten.gather.default, signed(4, 6, 10), 1, ints(6, 4, 14, 10)),
    _case(aten.gather.default, signed(4, 10), -1, ints(10, 4, 1)),
    _case(aten.gather.default, signed(4, 6, 10), 1, ints(6, 4, 14, 8)),
    _case(aten.scatter.src, signed(4, 14), 1, distinct(14, 4, 6), signed(4, 6)),
    _case(aten.scatter.value, signed(4, 14), 1, ints(14, 4, 6), 1.5),
    _case(aten.scatter_add.default, signed(4, 14), 1, ints(14, 4, 6), signed(4, 6)),
    _case(aten.scatter_reduce.two, signed(4, 14), 1, ints(14, 4, 6), signed(4, 6), "amax"),
    _case(aten.scatter_reduce.two, signed(4, 14), 1, ints(14, 4, 6), signed(4, 6), "sum"),
    _case(aten.unsafe_split_with_sizes.default, signed(6, 22), [4, 8, 10], 1),
    _case(aten.cat.default, [signed(0), signed(6, 10)], 0),
    _case(aten.unfold.default, signed(4, 6, 10), 1, 4, 2),
    _case(aten.diagonal.default, signed(4, 6, 6, 10), 0, 1, 2),
    _case(aten.tril.default, signed(4, 6, 10)),
    _case(aten.triu.default, signed(4, 6, 10), 1),
    _case(aten.meshgrid.indexing, [signed(4), signed(6), signed(10)], indexing="xy"),
    _case(aten.meshgrid.default, [signed(4), signed(6)]),
    _case(aten._unsafe_index.Tensor, signed(4, 6, 10), [None, ints(6, 14)]),
    _case(aten._unsafe_index_put.default, signed(14, 10), [ints(14, 6)], signed(6, 10), True),
    _case(aten.index_put.default, signed(4, 14, 10), [None, distinct(14, 6)], signed(4, 6, 10)),
    _case(aten.index_add.default, signed(4, 14, 10), 1, ints(14, 6), signed(4, 6, 10)),
    _case(aten.index_copy.default, signed(4, 14, 10), 1, distinct(14, 6), signed(4, 6, 10)),
    _case(aten.masked_scatter.default, signed(4, 14, 10), boolean(4, 1, 1), signed(6, 14, 10)),
    _case(aten.masked_scatter.default, signed(4, 14, 10), boolean(14, 1), signed(60, 10)),
    _case(aten.index_fill.int_Scalar, signed(4, 14, 10), 1, ints(14, 6), 1.5),
    _case(aten.index_fill.int_Tensor, signed(4, 14, 10), 1, ints(14, 6), signed()),
    _case(aten.scatter_reduce.two, signed(4, 14), 1, ints(14, 4, 6), signed(4, 6), "amin"),
    _case(aten.scatter_reduce.two, signed(4, 14), 1, ints(14, 4, 6), signed(4, 6), "prod"),
    _values(aten.one_hot.default, ints(10, 4, 6), 10),
    _values(aten.bucketize.Tensor, real(4, 6), ascending(10)),
    _values(aten.searchsorted.Tensor, ascending(4, 10), real(4, 6)),
]

REDUCTIONS = [
    _case(aten.sum.dim_IntList, signed(4, 6, 10), [1]),
    _case(aten.sum.dim_IntList, signed(4, 6, 10), [0, -1], True),
    _case(aten.sum.default, signed(4, 6)),
    _case(aten.sum.dim_IntList, signed(), [0]),
    _case(aten.mean.dim, signed(), [-1]),
    _case(aten.sum.dim_IntList, boolean(4, 6), [1]),
    _values(aten.sum.dim_IntList, signed(4, 6), [1], dtype=torch.int64),
    _values(aten.cumsum.default, signed(4, 6, 10), 1, dtype=torch.int64),
    _case(aten.mean.dim, signed(4, 6, 10), [-1], True),
    _case(aten.mean.default, signed(4, 6)),
    _values(aten.mean.dim, large(4, 6), [1]),
    _values(aten.mean.default, large(4, 6)),
    _case(aten.amax.default, tied(4, 6, 10), [1]),
    _case(aten.amax.default, unknown(4, 6, 10), [-1, 0]),
    _case(aten.amin.default, tied(4, 6, 10), [1], True),
    _case(aten.max.dim, tied(4, 6, 10), 1),
    _case(aten.max.default, tied(4, 6)),
    _case(aten.min.default, tied(4, 6)),
    _case(aten.min.dim, tied(4, 6, 10), 1, True),
    _case(aten.aminmax.default, tied(4, 6, 10), dim=1),
    _case(aten.var.correction, signed(4, 6, 10), [1]),
    _case(aten.std.correction, signed(4, 6, 10), [1]),
    _case(aten.prod.dim_int, signed(4, 6, 10), 1),
    _case(aten.prod.default, signed(4, 6)),
    _case(aten.any.dim, boolean(4, 6, 10), 1),
    _case(aten.any.default, boolean(4, 6)),
    _case(aten.all.dims, boolean(4, 6, 10), [1]),
    _case(aten._is_all_true.default, boolean(4, 6)),
    _case(aten.argmax.default, signed(4, 6, 10), -1),
    _case(aten.argmin.default, signed(4, 6), None),
    _case(aten.logsumexp.default, signed(4, 6, 10), [1]),
    _case(aten.linalg_vector_norm.default, signed(4, 6, 10), 2, [1]),
    _case(aten.linalg_vector_norm.default, signed(4, 6)),
    _case(aten.norm.ScalarOpt_dim, signed(4, 6, 10), 2, [1]),
    _case(aten.softmax.int, signed(4, 6, 10), -1),
    _case(aten._softmax.default, signed(4, 6, 10), 1, False),
    _case(aten.log_softmax.int, signed(4, 6, 10), -1),
    _case(aten._log_softmax.default, signed(4, 6, 10), -1, False),
    _case(aten.cumsum.default, signed(4, 6, 10), 1),
    _case(aten.cumprod.default, signed(4, 6, 10), 1),
    _values(aten.sort.default, signed(4, 6, 10), 1),
    _values(aten.sort.stable, signed(4, 6, 10), stable=True, dim=1),
    _case(aten.argsort.default, signed(4, 6, 10), 1),
    _case(aten.logcumsumexp.default, signed(4, 6, 10), 1),
    _values(aten.topk.default, signed(4, 6, 10), 4, 1),
    _case(aten.diff.default, signed(4, 6, 10), 1, 1),
    _case(aten.layer_norm.default, signed(4, 6, 10), [10], signed(10), signed(10)),
    _case(aten.layer_norm.default, signed(4, 6, 10), [6, 10]),
    _values(aten.native_layer_norm.default, signed(4, 6, 10), [10], signed(10), None, 1e-5),
    _case(aten.rms_norm.default, signed(4, 6, 10), [10], signed(10)),
    _case(aten.group_norm.default, signed(4, 12, 10), 6, signed(12), signed(12)),
    _case(aten._native_batch_norm_legit.no_stats, signed(3, 6, 10), signed(6), signed(6), True, 0.1, 1e-5),
    _case(aten._native_batch_norm_legit.no_stats, signed(1, 6, 10), None, None, True, 0.1, 1e-5),
    _case(aten.group_norm.default, signed(4, 12, 10), 6),
    _values(
        aten.batch_norm.default,
        signed(4, 6, 10),
        signed(6),
        signed(6),
        signed(6),
        real(6),
        False,
        0.1,
        1e-5,
        False,
    ),
    _values(
        aten._native_batch_norm_legit_no_training.default,
        signed(4, 6, 10),
        signed(6),
        signed(6),
        signed(6),
        real(6),
        0.1,
        1e-5,
    ),
    _values(aten.min.default, signed(4, 6)),
    _values(aten.count_nonzero.dim_IntList, ints(3, 4, 6), [1]),
    _case(aten.var.default, signed(4, 6), False),
    _case(aten.var_mean.correction, signed(4, 6, 10), [1]),
    _case(aten.std_mean.correction, signed(4, 6, 10), [1]),
    _case(aten.sum.dim_IntList, ints(9, 4, 6), [0]),
    _case(aten._safe_softmax.default, signed(4, 6, 10), -1),
    _values(aten.cummax.default, signed(4, 6, 10), 1),
    _values(aten.cummin.default, signed(4, 6, 10), 1),
    _case(aten.roll.default, signed(4, 6), [2], []),
    _case(aten._fft_c2c.default, complex_(4, 6, 10), [1], 0, True),
    _case(aten._fft_r2c.default, signed(4, 6, 10), [2], 0, True),
    _case(aten._fft_c2r.default, complex_(4, 6, 10), [2], 0, 18),
    _values(aten.histc.default, real(4, 6), 10, 0, 1),
    _values(aten.histc.default, real(4, 6), 10),
    _values(aten._fused_rms_norm.default, signed(4, 6, 10), [10], signed(10), 1e-5),
    _case(aten.cross_entropy_loss.default, signed(6, 10), ints(10, 6), None, 0),
    _case(aten.cross_entropy_loss.default, signed(6, 10), ints(10, 6), None, 2),
    _values(aten.cross_entropy_loss.default, signed(6, 10, 4), ints(10, 6, 4), real(10)),
    _case(aten.mse_loss.default, signed(6, 10), signed(6, 10), 0),
    _case(aten.mse_loss.default, signed(6, 10), signed(6, 10), 1),
    _case(aten.smooth_l1_loss.default, signed(6, 10), signed(6, 10), 2),
    _case(aten.huber_loss.default, signed(6, 10), signed(6, 10), 2),
]

POINTWISE = [
    _case(aten.hardswish.default, signed(4, 6)),
    _case(aten.log_sigmoid.default, signed(4, 6)),
    _values(aten.floor_divide.default, signed(4, 6), real(6)),
    _case(aten.add.Tensor, signed(4, 6), signed(4, 6)),
    _case(aten.add.Tensor, _SAME, _SAME),
    _case(aten.add.Tensor, signed(4, 6), signed(6), alpha=2),
    _case(aten.add.Tensor, signed(4, 6), 1.5),
    _case(aten.add.Scalar, signed(4, 6), 1.5),
    _case(aten.sub.Tensor, signed(4, 6), signed(4, 1)),
    _case(aten.rsub.Scalar, signed(4, 6), 1.0),
    _case(aten.mul.Tensor, signed(4, 6), signed(4, 6)),
    _case(aten.mul.Tensor, _SAME, _SAME),
    _case(aten.mul.Tensor, signed(4, 6), signed(4, 1)),
    _case(aten.mul.Tensor, signed(6), signed(4, 6)),
    _case(aten.mul.Tensor, signed(4, 6), 2.5),
    _case(aten.mul.Tensor, signed(4, 6), math.inf),
    _case(aten.mul.Scalar, signed(4, 6), 2.5),
    _case(aten.div.Tensor, signed(4, 6), real(4, 6)),
    _case(aten.div.Tensor, signed(4, 6), 3.0),
    _case(aten.div.Tensor, signed(4, 6), 0.0),
    _case(aten.div.Scalar, signed(4, 6), 3.0),
    _case(aten.div.Tensor_mode, signed(4, 6), real(6), rounding_mode="floor"),
    _case(aten.neg.default, signed(4, 6)),
    _case(aten.abs.default, signed(4, 6)),
    _case(aten.pow.Tensor_Scalar, real(4, 6), 2),
    _case(aten.pow.Scalar, 2.0, real(4, 6)),
    _case(aten.sqrt.default, real(4, 6)),
    _case(aten.rsqrt.default, real(4, 6)),
    _case(aten.exp.default, signed(4, 6)),
    _case(aten.sigmoid.default, signed(4, 6)),
    _case(aten.tanh.default, signed(4, 6)),
    _case(aten.sin.default, signed(4, 6)),
    _case(aten.relu.default, signed(4, 6)),
    _case(aten.maximum.default, signed(4, 6), signed(6)),
    _case(aten.eq.Tensor, ints(3, 4, 6), ints(3, 6)),
    _case(aten.gt.Scalar, signed(4, 6), 0.0),
    _case(aten.logical_and.default, boolean(4, 6), boolean(6)),
    _case(aten.bitwise_not.default, boolean(4, 6)),
    _case(aten._to_copy.default, signed(4, 6), dtype=torch.float32),
    _case(aten._to_copy.default, single(4, 6), dtype=torch.float64),
    _case(aten._to_copy.default, ints(9, 4, 6), dtype=torch.float64),
    _case(aten.to.dtype, single(4, 6), torch.float64),
    _case(aten.type_as.default, single(4, 6), signed(3)),
    _case(aten.type_as.default, single(4, 6), signed(4, 6)),
    _case(aten.fill.Scalar, signed(4, 6), -1.5),
    _case(aten.fill.Tensor, signed(4, 6), signed()),
    _case(aten.masked_fill.Scalar, signed(4, 6), boolean(6), -1.5),
    _case(aten.masked_fill.Scalar, signed(4, 6), boolean(6), 0.0),
    _case(aten.masked_fill.Tensor, signed(4, 6), boolean(4, 6), signed()),
    _case(aten.where.self, boolean(4, 6), signed(4, 6), signed(6)),
    _case(aten.where.ScalarOther, boolean(4, 6), signed(4, 6), 0.0),
    _case(aten.dropout.default, signed(4, 6), 0.5, False),
    _case(aten.silu.default, signed(4, 6)),
    _case(aten.gelu.default, signed(4, 6)),
    _case(aten.softplus.default, signed(4, 6)),
    _case(aten.zeros_like.default, signed(4, 6)),
    _case(aten.ones_like.default, signed(4, 6)),
    _case(aten.full_like.default, signed(4, 6), 2.5),
    _values(aten.copy.default, signed(4, 6), signed(6)),
    _case(aten.prelu.default, signed(4, 6, 10), signed(6)),
    _case(aten.prelu.default, signed(4, 6, 10), signed(1)),
    _case(aten.addcmul.default, signed(4, 6), signed(4, 6), signed(6)),
    _case(aten.lerp.Tensor, signed(4, 6), signed(4, 6), signed(6)),
    _case(aten.lerp.Scalar, signed(4, 6), signed(4, 6), 0.3),
    _case(aten.clamp.default, signed(4, 6), -0.5, 0.5),
    _case(aten.__and__.Tensor, boolean(4, 6), boolean(4, 6)),
    _case(aten.__or__.Tensor, boolean(4, 6), boolean(4, 6)),
    _case(aten.leaky_relu.default, signed(4, 6)),
    _case(aten.relu6.default, signed(4, 6)),
    _case(aten.selu.default, signed(4, 6)),
    _case(aten.square.default, signed(4, 6)),
    _case(aten.mish.default, signed(4, 6)),
    _case(aten.logaddexp.default, signed(4, 6), signed(4, 6)),
    _case(aten.addcdiv.default, signed(4, 6), signed(4, 6), real(6)),
    _case(aten.rsub.Tensor, signed(4, 6), signed(4, 6)),
    _case(aten.where.ScalarSelf, boolean(4, 6), 0.0, signed(4, 6)),
    _case(aten.where.Scalar, boolean(4, 6), 1.0, 2.0),
    _case(aten.complex.default, signed(4, 6), signed(4, 6)),
    _case(aten.polar.default, real(4, 6), signed(4, 6)),
    _case(aten.mul.Tensor, complex_(4, 6), complex_(6)),
    _case(aten.real.default, complex_(4, 6)),
    _case(aten.imag.default, complex_(4, 6)),
    _case(aten._conj.default, complex_(4, 6)),
    _case(aten.feature_dropout.default, signed(4, 6), 0.5, False),
    _values(aten.isin.Tensor_Scalar, ints(4, 4, 6), 2),
    _case(aten.__xor__.Tensor, boolean(4, 6), boolean(4, 6)),
]

_HEADS = (signed(3, 7, 12, 10), signed(3, 14, 4, 10), signed(3, 14, 4, 22))
_PACKED = (signed(7, 12, 10), signed(14, 4, 10), signed(14, 4, 22))
_STARTS = tuple(
    Operand((3,), lambda _, at=at: torch.tensor(at, dtype=torch.int32)) for at in ((0, 3, 7), (0, 5, 14))
)
_flash, _flash_3 = torch.ops.flash_attn, torch.ops.flash_attn_3
KERNELS = [
    _case(_flash._flash_attn_forward.default, *_HEADS, 0.0, 0.3, True, -1, -1, 0.0, None, False),
    _case(_flash._flash_attn_forward.default, *_HEADS, 0.0, 0.3, False, 3, 2, 5.0, signed(12), False),
    _case(_flash._flash_attn_forward.default, *_HEADS, 0.0, 0.3, False, -1, -1, 0.0, signed(3, 12), False),
    _case(_flash._flash_attn_varlen_forward.default, *_PACKED, *_STARTS, 4, 9, 0.0, 0.3, True),
    _case(_flash_3._flash_attn_forward.default, *_HEADS, softmax_scale=0.3, causal=True),
]

CASES = [*KERNELS, *MATMULS, *RESAMPLING, *VIEWS, *PARTS, *REDUCTIONS, *POINTWISE]

_UNARY, _BINARY = (("Tensor",), ("Tensor", "Tensor"))


def _sampled() -> list[Case]:
    """Functional operators of one or two tensors that torch tags as pointwise, every fifth of them."""
    found = []
    for name in sorted(torch._C._dispatch_get_all_op_names()):
        namespace, _, rest = name.partition("::")
        base, _, overload = rest.partition(".")
        if namespace != "aten" or base.startswith("special_") or base.endswith(("_", "_backward")):
            continue
        op = getattr(getattr(aten, base), overload or "default")
        kinds = tuple(str(a.type) for a in op._schema.arguments if not a.has_default_value())
        random = torch.Tag.nondeterministic_seeded in op.tags
        tensor = [str(r.type) for r in op._schema.returns] == ["Tensor"]
        if torch.Tag.pointwise in op.tags and tensor and not op._schema.is_mutable and not random:
            if kinds in (_UNARY, _BINARY) and base not in ("clamp", "clip"):  # they want an option
                found.append(_pointwise(op, len(kinds)))
    return found[::5]


def _pointwise(op: torch._ops.OpOverload, arity: int) -> Case:
    whole = op._schema.name.split("::")[1] in _INTEGERS
    operands: list[Operand] = [ints(9, 4, 6), ints(9, 6)] if whole else [real(4, 6), real(6)]
    return Case(op, tuple(operands[:arity]), gradients=False)


_INTEGERS = {
    "bitwise_and", "bitwise_left_shift", "bitwise_not", "bitwise_or", "bitwise_right_shift", "bitwise_xor",
    "gcd", "lcm", "__and__", "__lshift__", "__or__", "__rshift__", "__xor__",
}  # fmt: skip

SAMPLED = _sampled()


def _recurrent(op: object, gates: int, *state: Operand) -> Case:
    """A recurrent layer without biases."""
    weights = [signed(gates * 10, 6), signed(gates * 10, 10)]
    given = (list(state) if len(state) > 1 else state[0], weights, False, 1, 0.0, False, False, True)
    return _case(op, signed(4, 3, 6), *given)


_STATE = signed(1, 4, 10)

# Calls that are always computed whole, with what the reason says.
REFUSED = {
    _recurrent(aten.lstm.input, 4, _STATE, _STATE): "at every time step",
    _recurrent(aten.gru.input, 3, _STATE): "at every time step",
    _recurrent(aten.rnn_tanh.input, 1, _STATE): "at every time step",
    _recurrent(aten.rnn_relu.input, 1, _STATE): "at every time step",
    _values(
        aten._scaled_mm.default, *_EIGHT, single(), single(), None, single(), out_dtype=torch.float8_e4m3fn
    ): "rounded to eight bits",
    _case(aten.index.Tensor, signed(4, 6), [boolean(4)]): "data-dependent",
    _case(aten.nonzero.default, ints(3, 4, 6)): "depends on the data",
    _case(aten.masked_select.default, signed(4, 6), boolean(4, 6)): "depends on the data",
    _case(aten.masked_scatter.default, signed(4, 6), boolean(4, 6), signed(24)): "mask bits",
    _case(aten.view.dtype, signed(4, 6), torch.float32): "bits",
    _case(aten.as_strided.default, signed(4, 6), [2, 3], [6, 1]): "strides",
    _case(aten.bernoulli.default, real(4, 6)): "random",
    _case(aten.rand_like.default, real(4, 6)): "random",
    _case(aten.dropout.default, signed(4, 6), 0.5, True): "random",
    _case(aten.native_dropout.default, signed(4, 6), 0.5, True): "random",
    _case(aten.einsum.default, "ii->i", [signed(4, 4)]): "twice",
    _case(aten.conv1d.default, signed(6, 10), signed(14, 6, 3)): "batch",
    _case(
        aten.batch_norm.default, signed(4, 6, 10), None, None, None, None, True, 0.1, 1e-5, False
    ): "statistics",
    _case(
        aten._native_batch_norm_legit_functional.default,
        *(signed(4, 6, 10), None, None, signed(6), real(6)),
        *(False, 0.1, 1e-5),
    ): "not updated",
    _case(aten.bincount.default, ints(4, 6)): "depends on the data",
    _case(aten.where.default, boolean(4, 6)): "depends on the data",
    _case(aten._unique2.default, ints(4, 6)): "depends on the data",
    _case(aten.unique_dim.default, ints(4, 6), 0): "depends on the data",
    _case(aten.repeat_interleave.Tensor, ints(4, 6)): "depends on the data",
    _case(aten.svd.default, signed(4, 6)): "no rule for",
}

_WEIGHT = "a parameter is never partial: its gradient would have to be summed over ranks for nothing"
_LINES = (
    "windows and neighbours reach across borders unless sizes happen to fit; batch and channels are enough"
)
_TRUTH = "ranks do not exchange truth values"
_BOUNDARIES = "counts of passed boundaries add up, but no parameter is a long list of boundaries"
_INFINITE = "summands of two signs, times infinity, are not a number where their sum is infinite"
_LOST = "the values of this operand are not used"

# Divisions that work and that are left out: operator, inputs as printed (with *), and why.
EXCUSED = [
    ("flash_attn*", "(R, R, P(sum)*", "a summand would be rounded"),
    ("flash_attn*", "(R, R, S(*", "kernels want values as wide as keys"),
    ("aten.linear.*", "(R, P(sum)*", _WEIGHT),
    ("aten.embedding.*", "(P(sum), R)", _WEIGHT),
    ("aten.embedding.*", "(R, S(*", "not with scale_grad_by_freq: its gradient counts all places"),
    ("aten.bilinear.*", "(R, R, P(sum)*", _WEIGHT),
    ("aten.bilinear.*", "(P(sum), R, R*", _INFINITE),
    ("aten.bilinear.*", "(R, P(sum), R*", _INFINITE),
    ("aten.einsum.*", "(S(1), R)", _INFINITE),
    ("aten.einsum.*", "(R, S(0))", _INFINITE),
    ("aten.mul.Tensor", "(P(sum), R)", _INFINITE),
    ("aten.mul.Tensor", "(R, P(sum))", _INFINITE),
    ("aten.div.Tensor", "(P(sum), R)", _INFINITE),
    ("aten.addcmul.*", "(P(sum), P(sum), R)", _INFINITE),
    ("aten.addcmul.*", "(P(sum), R, P(sum))", _INFINITE),
    ("aten.addcdiv.*", "(P(sum), P(sum), R)", _INFINITE),
    ("aten.lerp.Tensor", "(P(sum), P(sum), R)", _INFINITE),
    ("aten._embedding_bag*", "(P(sum), R, R)*", _WEIGHT),
    ("transformers.grouped_mm*", "(R, P(sum)*", _WEIGHT),
    ("aten.conv*", "(R, P(sum)*", _WEIGHT),
    ("aten.*_norm*", "(R, P(sum)*", _WEIGHT),
    ("aten.*batch_norm*", "(P(sum), R, P(sum), P(sum), R)", _WEIGHT),
    ("aten.*pool*", "(S(*", _LINES),
    ("aten.*upsample_nearest*", "(S(*", _LINES),
    ("aten.any.default", "(S(*", _TRUTH),
    ("aten._is_all_true.default", "(S(*", _TRUTH),
    ("aten.type_as.*", "*", _LOST),
    ("aten.expand_as.*", "*P(sum))", _LOST),
    ("aten.copy.*", "(P(sum), R)", _LOST),
    ("aten.fill.*", "(P(sum)*", _LOST),
    ("aten.new_*", "*", _LOST),
    ("aten.cat.*", "*", "an empty operand lies in all placements at once"),
    ("aten.meshgrid.*", "*", "every result is linear in another operand"),
    (
        "aten.scatter_reduce.*",
        "(P(sum), R, R)",
        "products are linear in x alone, which nobody needs",
    ),
    ("aten.scatter_reduce.*", "(R, S(1), S(1))", "who attains a maximum, and its gradient, x decides too"),
    ("aten.aminmax.*", "(S(*", "a rule completes a factor by one reduction, not by a minimum and a maximum"),
    ("aten.polar.*", "(P(sum), R)", "torch's gradient holds for positive lengths only"),
    ("aten.bucketize.*", "(R, S(0))", _BOUNDARIES),
    ("aten.searchsorted.*", "(S(1), R)", _BOUNDARIES),
]

# Carried out with all pairs of strategies, on 2 x 2 ranks.
PAIRED = [
    _case(aten.linear.default, signed(4, 10), signed(6, 10), signed(6)),
    _case(aten.addmm.default, signed(14), signed(6, 10), signed(10, 14)),
    _case(aten.baddbmm.default, signed(1, 14), signed(4, 6, 10), signed(4, 10, 14)),
    _case(
        aten.scaled_dot_product_attention.default,
        signed(3, 12, 6, 10),
        signed(3, 4, 14, 10),
        signed(3, 4, 14, 22),
        enable_gqa=True,
    ),
    _case(aten.embedding.default, signed(14, 10), ints(14, 6)),
    _case(aten.gather.default, signed(4, 14), 1, ints(14, 4, 1)),
    _case(aten.conv1d.default, signed(4, 6, 10), signed(14, 6, 3), signed(14)),
    _case(aten.mean.dim, signed(4, 6, 10), [0, 2]),
    _case(aten.amax.default, tied(4, 6, 10), [0, 2]),
    _case(aten.view.default, signed(6, 40), [6, 4, 10]),
    _case(aten.view.default, signed(4, 10, 6), [4, 60]),
    _case(aten.split.Tensor, signed(6, 20), 10, 1),
    _case(aten.expand.default, signed(4, 1, 10), [4, 6, 10]),
    _case(aten.mul.Tensor, signed(4, 6), signed(6)),
    _case(aten.index_put.default, signed(14, 10), [ints(14, 6)], signed(6, 10), True),
    _case(aten.group_norm.default, signed(4, 12, 10), 6),
    _case(aten.glu.default, signed(4, 12)),
]

# Rows that are not carried out.
WITHOUT_CASE = {
    "aten._grouped_mm",  # the CPU has no kernel for double precision; the fallback has the same row
    "aten.empty_like",  # its values are not the same twice
    "aten.new_empty",
    "tpcompile.ir.markers.keep_whole",  # a marker: tests/passes/test_golden.py has it
    "tpcompile.uniform",  # what a part of it is depends on where it lies: see test_randomness
    "tpcompile.autograd_function",  # one for every function of a user's: see tests/runtime/test_meaning.py
    "tpcompile.linear_4bit",  # kernels of bitsandbytes: tests/weights/test_bitsandbytes.py tries all choices
    "tpcompile.linear_8bit",
    "tpcompile.opaque_module",  # has declared placements only: see test_custom_strategies
    # torch's kernel writes beyond statistics of another size: test_module_life trains with it
    "aten._native_batch_norm_legit_functional",
    "aten.native_dropout",  # torch's kernel and its shape function disagree on the mask's type
}

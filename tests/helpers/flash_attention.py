"""Flash attention's operators and functions by name and form, with plain arithmetic in place of kernels.

The forms are those of flash-attention 2.7 and 3 (github.com/Dao-AILab/flash-attention).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LIBRARIES = [torch.library.Library(name, "FRAGMENT") for name in ("flash_attn", "flash_attn_3")]
_TWO, _THREE = _LIBRARIES
_OPTIONS = "float dropout_p, float softmax_scale, bool causal, SymInt window_size_left"
_TWO.define(
    f"_flash_attn_forward(Tensor q, Tensor k, Tensor v, {_OPTIONS}, SymInt window_size_right, float softcap, "
    "Tensor? alibi_slopes, bool return_softmax) -> (Tensor, Tensor, Tensor, Tensor)"
)
_TWO.define(
    "_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    f"SymInt max_seqlen_q, SymInt max_seqlen_k, {_OPTIONS}=-1, SymInt window_size_right=-1, "
    "float softcap=0.0, Tensor? alibi_slopes=None, bool return_softmax=False, Tensor? block_table=None, "
    "Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_THREE.define(
    "_flash_attn_forward(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, "
    "Tensor? qv=None, Tensor? out_=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
    "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, Tensor? page_table=None, "
    "Tensor? kv_batch_idx=None, Tensor? leftpad_k=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
    "Tensor? seqlens_rotary=None, Tensor? q_descale=None, Tensor? k_descale=None, Tensor? v_descale=None, "
    "float? softmax_scale=None, bool causal=False, SymInt window_size_left=-1, SymInt window_size_right=-1, "
    "SymInt attention_chunk=0, float softcap=0.0, bool rotary_interleaved=True, "
    "Tensor? scheduler_metadata=None, SymInt num_splits=1, bool? pack_gqa=None, SymInt sm_margin=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rows: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    causal: bool = False,
    window: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What is attended to, and logarithms of sums: ``[batch] length heads size``, ``[batch] heads length``.

    Args:
        q, k, v: queries, keys, values.
        rows: where sequences begin that are packed in one row.
        scale, causal, window, softcap, slopes: of the scores; windows and causality end at the last key.
    """
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[-3] // max(k.shape[-3], 1), -3) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    i, j = (torch.arange(n, dtype=torch.int32, device=q.device) for n in (q.shape[-2], k.shape[-2]))
    shown = torch.ones(len(i), len(j), dtype=torch.bool, device=q.device)
    if rows is None:
        i = i + len(j) - len(i)
    else:
        of_q, of_k = (
            torch.searchsorted(at, x, right=True, out_int32=True) for at, x in zip(rows, (i, j), strict=True)
        )
        shown = of_q[:, None] == of_k
        i, j = i - rows[0][of_q - 1], j - rows[1][of_k - 1]
    apart = i[:, None] - j
    if slopes is not None:
        scores = scores - slopes[..., None, None] * apart.abs()
    left, right = window[0], 0 if causal else window[1]
    shown = shown & ((apart <= left) | (left < 0)) & ((-apart <= right) | (right < 0))
    scores = scores.masked_fill(~shown, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(-3, -2), scores.logsumexp(-1).float()


def _two(q: Tensor, k: Tensor, v: Tensor, p: float, scale: float, causal: bool, *more: Any) -> Any:
    left, right, cap, slopes, _ = more
    out, lse = attend(q, k, v, scale=scale, causal=causal, window=(left, right), softcap=cap, slopes=slopes)
    return out.contiguous(), lse, q.new_empty(0), torch.zeros(2, dtype=torch.int64, device=q.device)


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, _: int, __: int, p: float, *more: Any
) -> Any:
    scale, causal, left, right, cap, slopes = (*more, *(-1, -1, 0.0, None)[len(more) - 2 :])[:6]
    window = (left, right)
    out, lse = attend(
        q, k, v, rows=(of_q, of_k), scale=scale, causal=causal, window=window, softcap=cap, slopes=slopes
    )
    return out.contiguous(), lse, q.new_empty(0), torch.zeros(2, dtype=torch.int64, device=q.device)


def _three(q: Tensor, k: Tensor, v: Tensor, *none: Any, softmax_scale: Any = None, **more: Any) -> Any:
    out, lse = attend(q, k, v, scale=softmax_scale, causal=more.get("causal", False))
    return out.contiguous(), lse, q.new_empty(0), q.new_empty(0)


# Composite, so that they have gradients: the packages give them by functions of autograd.
_TWO.impl("_flash_attn_forward", _two, "CompositeImplicitAutograd")
_TWO.impl("_flash_attn_varlen_forward", _varlen, "CompositeImplicitAutograd")
_THREE.impl("_flash_attn_forward", _three, "CompositeImplicitAutograd")


class FlashAttnFunc(torch.autograd.Function):
    """As of flash-attention 2: its backward is its own, and attends once more."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float,
        softmax_scale: float | None,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        return_softmax: bool,
        is_grad_enabled: bool,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.options = {
            "scale": softmax_scale,
            "causal": causal,
            "window": window_size,
            "softcap": softcap,
            "slopes": alibi_slopes,
        }
        return attend(q, k, v, **ctx.options)[0].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *rest: Any) -> Any:
        given = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            made, _ = attend(*given, **ctx.options)
        return *torch.autograd.grad(made, given, grad), *(None,) * 9


class FlashAttnVarlenFunc(torch.autograd.Function):
    """The same for rows that are packed."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        softmax_scale: float | None,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
        alibi_slopes: Tensor | None,
        deterministic: bool,
        return_softmax: bool,
        block_table: Tensor | None,
        is_grad_enabled: bool,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, cu_seqlens_q, cu_seqlens_k)
        ctx.options = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
        return attend(q, k, v, rows=(cu_seqlens_q, cu_seqlens_k), **ctx.options)[0].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *rest: Any) -> Any:
        q, k, v, *rows = ctx.saved_tensors
        given = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            made, _ = attend(*given, rows=(rows[0], rows[1]), **ctx.options)
        return *torch.autograd.grad(made, given, grad), *(None,) * 14


for _function in (FlashAttnFunc, FlashAttnVarlenFunc):
    _function.__module__ = "flash_attn.flash_attn_interface"


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """The package's function."""
    found: Tensor = FlashAttnFunc.apply(
        *(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic),
        *(return_attn_probs, torch.is_grad_enabled()),
    )
    return found


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """The package's function."""
    found: Tensor = FlashAttnVarlenFunc.apply(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal),
        *(window_size, softcap, alibi_slopes, deterministic, return_attn_probs, block_table),
        torch.is_grad_enabled(),
    )
    return found

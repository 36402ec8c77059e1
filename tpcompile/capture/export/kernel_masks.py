"""What transformers finds out from values for attention kernels: known in a trace, or checked in every call.

Its mask for flex attention leaves the padding out where nothing is padded: in a trace it never does. What it
prepares for flash attention depends on padding, and on positions that begin anew: a program is for calls
without padding whose positions do not, and others are refused when their values are seen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

_PADDED = (
    "attention_mask hides tokens, which a program with flash attention does not: give rows of one length "
    "without a mask, packed rows with cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k, or use "
    'attn_implementation="sdpa"'
)
_PACKED = (
    "position_ids begin anew within a row: with flash attention a program has to be given cu_seq_lens_q, "
    'cu_seq_lens_k, max_length_q and max_length_k, too; or use attn_implementation="sdpa"'
)


@contextmanager
def kernel_masks() -> Iterator[None]:
    """Lets transformers' masks for kernels be made without looking at values inside of the block."""
    masking: Any = sys.modules.get("transformers.masking_utils")
    flash: Any = sys.modules.get("transformers.modeling_flash_attention_utils")
    with ExitStack() as stack:
        if masking is not None:
            table = masking.AttentionMaskInterface._global_mapping
            for name, original in list(table.items()):
                if original in (masking.flex_attention_mask, masking.flash_attention_mask):
                    flex = original is masking.flex_attention_mask
                    table[name] = _always_padded(masking, original) if flex else _never_padded(original)
                    stack.callback(table.__setitem__, name, original)
        if flash is not None:
            look = flash._is_packed_sequence
            stack.enter_context(patch.object(flash, look.__name__, _never_packed(look)))
        yield


def _always_padded(masking: Any, original: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        with patch.object(masking, "fast_all", lambda _: False):
            return original(*args, **kwargs)

    return make


def _never_padded(original: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        mask: Tensor | None = kwargs.get("attention_mask")
        if mask is None or kwargs["kv_length"] != mask[:, -kwargs["kv_length"] :].shape[1]:
            return original(*args, **kwargs)
        torch._assert_async(mask[:, -kwargs["kv_length"] :].all(), _PADDED)
        return None

    return make


def _never_packed(original: Callable[..., Any]) -> Callable[..., Any]:
    def look(position_ids: Tensor | None, batch_size: int) -> bool:
        packed = original(position_ids, batch_size)
        if isinstance(packed, Tensor):
            torch._assert_async(~packed, _PACKED)
            return False
        return bool(packed)

    return look

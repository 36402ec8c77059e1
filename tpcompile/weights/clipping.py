"""torch's clipping of gradients: one message for the norm of all of them, and scaling of the parts.

torch's own functions would come to the same through ``dispatch``, with a message per list of tensors and two
hundred wrappers to make. Here the message also says what was asked for, so that ranks that ask for different
things find out before a gradient is changed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import utils
from torch.nn.utils import clip_grad

from .norms import total_norm
from .sharded_parameter import ShardedParameter

_CLIP: Any = clip_grad
_UTILS: Any = utils


def tell_clipping() -> None:
    """Replaces what ``clip_grad_norm_`` calls."""
    total = functools.partial(_total_norm, clip_grad._get_total_norm)
    scale = functools.partial(_scale, clip_grad._clip_grads_with_norm_)
    for ours, original in ((total, clip_grad._get_total_norm), (scale, clip_grad._clip_grads_with_norm_)):
        functools.update_wrapper(ours, original)
    _CLIP._get_total_norm = _UTILS.get_total_norm = total
    _CLIP._clip_grads_with_norm_ = _UTILS.clip_grads_with_norm_ = scale


def _total_norm(
    original: Callable[..., Tensor],
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """The norm of tensors taken together."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    kinds = {*map(type, tensors)}
    if ShardedParameter not in kinds or not kinds <= {ShardedParameter, Tensor} or not float(norm_type) > 0:
        return original(tensors, norm_type, error_if_nonfinite, foreach)
    limit = sys._getframe(1).f_locals.get("max_norm")  # of clip_grad_norm_, if that asks
    asked = f"gradients, clipped to {limit}, {error_if_nonfinite}"
    with torch.no_grad():
        total = total_norm(tensors, float(norm_type), asked)
    if error_if_nonfinite and not total.isfinite():
        raise RuntimeError(
            f"The total norm of order {norm_type} of the gradients is {total.item()}, so they cannot be "
            "clipped (error_if_nonfinite=True)"
        )
    return total


@torch.no_grad()
def _scale(
    original: Callable[..., None],
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Scales gradients."""
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    leaves = [p._local_tensor if type(p) is ShardedParameter else p for p in parameters]
    original(leaves, max_norm, total_norm, foreach)
    # Wrappers of the gradients that somebody may hold; `p.grad` would look whether they still are that.
    held = (p.__dict__.get("_gradient") for p in parameters if type(p) is ShardedParameter)
    increment_version([grad for grad in held if grad is not None])

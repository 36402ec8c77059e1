"""Gathers a sharded model's weights: the ordinary state dict."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpcompile.ir.layout.weight_layout import ParamLayout, WeightLayout

if TYPE_CHECKING:
    from tpcompile.runtime.runtime import Runtime


def full_state_dict(model: nn.Module, runtime: Runtime) -> dict[str, Tensor]:
    """The whole tensors under the original names, tied ones under each of theirs.

    Non-persistent buffers are left out, as in ``state_dict``.
    """
    local = nn.Module.state_dict(model)
    if runtime.layout is None:
        return dict(local)
    first: dict[int, str] = {}
    full: dict[str, Tensor] = {}
    for name, tensor in local.items():
        known = first.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), name)
        layout = runtime.layout.params.get(name)
        if layout is None and known in full:
            full[name] = full[known]
        elif layout is None or is_whole(layout):
            full[name] = tensor
        else:
            full[name] = gather(runtime.layout, name, tensor, runtime.compiler.rank, runtime.compiler.group)
    return full


def is_whole(layout: ParamLayout) -> bool:
    """Whether every rank holds the parameter as it is."""
    one = len(layout.segments) == 1 and layout.selection is None
    return one and all(s is None for s in layout.segments[0].shards)


def gather(
    layout: WeightLayout, name: str, local: Tensor, rank: int, group: dist.ProcessGroup | None
) -> Tensor:
    """One whole parameter, on every rank. Uneven parts travel filled up to the largest."""
    shapes = [layout.local_shape(name, r) for r in range(layout.ranks)]
    largest = max(map(math.prod, shapes))
    sent = local.new_zeros(largest)
    sent[: local.numel()] = local.detach().flatten()
    received = [torch.empty_like(sent) for _ in shapes]
    dist.all_gather(received, sent, group=group)
    parts = {r: received[r][: math.prod(s)].reshape(s) for r, s in enumerate(shapes)}
    return layout.assemble(name, parts)

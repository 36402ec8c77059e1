"""Captures once for all ranks: where they hold the same model, the first rank's program serves them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tpcompile.capture.export.captured import Captured
from tpcompile.capture.export.dynamic_dims import Dims
from tpcompile.ir.calls import flatten_call
from tpcompile.ranks.agree import from_first, same

from .store_capture import capture_cached, capture_name, try_dump, try_load


def capture_shared(
    model: nn.Module,
    bound: dict[str, Any],
    group: dist.ProcessGroup | None,
    *,
    dynamic: bool | Mapping[str, Dims] = True,
    device: torch.device | str | None = None,
) -> Captured:
    """What ``capture_cached`` gives for the call, on every rank of a group, computed by as few as possible.

    Ranks of one machine share its processors, and a capture takes seconds. A rank captures by itself where
    a model cannot be described, where ranks differ (which is found out later, and told), and where the
    program cannot be sent.

    Raises:
        TpCompileError: the first rank could not capture the call.
    """

    def capture() -> Captured:
        return capture_cached(model, bound, dynamic=dynamic, device=device)

    if group is None or dist.get_world_size(group) == 1:
        return capture()
    name = capture_name(model, bound, dynamic, device)
    if not same(group, name) or name is None:
        return capture()
    mine: list[Captured] = []

    def send() -> bytes | None:
        mine.append(capture())
        return try_dump(mine[0])

    data = from_first(group, send, "capture the model")
    if mine:
        return mine[0]
    received = None if data is None else try_load(data, flatten_call(bound)[0], "the first rank's program")
    return capture() if received is None else received

"""Whether ranks run the same programs in the same order.

Programs of two models, or of two parts, may send the same: ranks that take them in different orders would add
up what belongs to different calls, and nobody would notice. To compare every call would cost a message each;
so what was run, and of which sizes, is hashed, and hashes are compared at the first, second, fourth ... call,
and at every 64th.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

import torch.distributed as dist

from .agree import compare

_EVERY = 64

_RUN: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
"""Per group how many programs were run, and a hash of which."""

_MODELS: defaultdict[str, int] = defaultdict(int)
"""Per group how many models have been sharded over it."""


def number_of_model(group_name: str) -> int:
    """A number for a new model, the same on all ranks of a group: they shard their models together."""
    _MODELS[group_name] += 1
    return _MODELS[group_name]


def compare_order(group: dist.ProcessGroup, call: Hashable, what: str) -> bool:
    """Notes that a program is about to run, and compares at times what has been run.

    Args:
        group: the ranks.
        call: numbers that tell the program, and the sizes of the call, from others.
        what: the program as text.

    Returns:
        Whether it is time to compare all of the call.

    Raises:
        TpCompileError: the ranks have not run the same programs in the same order.
    """
    count, before = _RUN[group.group_name]
    count, now = count + 1, hash((before, call))  # of numbers, it is the same in every process
    _RUN[group.group_name] = [count, now]
    if count & (count - 1) and count % _EVERY:
        return False
    todo = "make the same calls, of the same models, in the same order; compare_calls=True says which differ"
    lines = [f"{count} calls, the last one {what}", f"all of them: {now & 0xFFFFFFFF:08x}"]
    compare(group, "orders of calls", lines, todo)
    return count % _EVERY == 0

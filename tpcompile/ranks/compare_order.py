"""Whether ranks run the same programs in the same order.

Programs of two models, or of two parts, may send the same: ranks that take them in different orders would add
up what belongs to different calls, and nobody would notice. To compare every call would cost a message each;
so what was run, and of which sizes, is hashed, and hashes are compared at the first, second, fourth ... call,
and at every 64th. Over gloo, where a message costs little beside a program's own, and tensors of other sizes
than the other ranks' end the process, they are compared as well at each call that is unlike the one before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

import torch.distributed as dist

from .agree import compare
from .own_groups import backend_of

_EVERY = 64


@dataclass
class _Run:
    """What the ranks of a group have run.

    Attributes:
        count: how many programs.
        mark: a hash of which, in order.
        last: the last call.
    """

    count: int = 0
    mark: int = 0
    last: Hashable = None


_RUN: defaultdict[str, _Run] = defaultdict(_Run)
"""By the name of the group."""

_MODELS: defaultdict[str, int] = defaultdict(int)
"""Per group how many models have been sharded over it."""


def number_of_model(group_name: str) -> int:
    """A number for a new model, the same on all ranks of a group: they shard their models together."""
    _MODELS[group_name] += 1
    return _MODELS[group_name]


def compare_order(group: dist.ProcessGroup, call: Hashable, what: str, steered: bool = False) -> bool:
    """Notes that a program is about to run, and compares at times what has been run.

    Args:
        group: the ranks.
        call: numbers that tell the program, and the sizes of the call, from others.
        what: the program as text.
        steered: whether the call follows from what was compared (inside of ``generate``).

    Returns:
        Whether it is time to compare all of the call.

    Raises:
        TpCompileError: the ranks have not run the same programs in the same order. The call is not noted.
    """
    run = _RUN[group.group_name]
    count, mark = run.count + 1, hash((run.mark, call))  # of numbers, it is the same in every process
    due = not count & (count - 1) or count % _EVERY == 0
    if due or (call != run.last and not steered and backend_of(group) == "gloo"):
        todo = "make the same calls, of the same models, in the same order; compare_calls=True tells more"
        lines = [f"{count} calls, the last one {what}: {call}", f"all of them: {mark & 0xFFFFFFFF:08x}"]
        compare(group, "orders of calls", lines, todo)
    run.count, run.mark, run.last = count, mark, call
    return count % _EVERY == 0

"""torch's functional collectives along dimension 0; a failure says which ranks are missing.

What begins to send gives a function that waits for it: meanwhile other things can be computed.

gloo takes the address of a card's memory for one of the host in the operators that gather and reduce-scatter
(torch issue 152645), which ends the process; what is on a card passes through the host there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from tpcompile.ir.torch_internals import resolve_process_group
from tpcompile.ranks.lost_ranks import is_loss, lost

_C10D = torch.ops._c10d_functional

Begun = Callable[[], Tensor]
"""Waits for what was sent, and gives it; called once."""


def reduce_all(x: Tensor, op: str, group: str) -> Tensor:
    """The elementwise reduction over the ranks, of the same shape."""
    return begin_reduce(x, op, group)()


def begin_reduce(x: Tensor, op: str, group: str) -> Begun:
    """Begins what `reduce_all` does."""
    return _begin(lambda: _C10D.all_reduce(x, op, group), "all-reduce", group)


def gather_rows(x: Tensor, ranks: int, group: str) -> Tensor:
    """The rows of all ranks, who have as many each."""
    return begin_gather_rows(x, ranks, group)()


def begin_gather_rows(x: Tensor, ranks: int, group: str) -> Begun:
    """Begins what `gather_rows` does."""
    return _send(x, group, "all-gather", lambda a: _C10D.all_gather_into_tensor(a, ranks, group))


def reduce_scatter_rows(x: Tensor, ranks: int, group: str) -> Tensor:
    """This rank's rows of the sum over the ranks, who get as many each."""
    return begin_reduce_scatter_rows(x, ranks, group)()


def begin_reduce_scatter_rows(x: Tensor, ranks: int, group: str) -> Begun:
    """Begins what `reduce_scatter_rows` does."""
    return _send(x, group, "reduce-scatter", lambda a: _C10D.reduce_scatter_tensor(a, "sum", ranks, group))


def exchange_rows(x: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
    """So many rows from each rank, for so many to each."""
    return _begin(lambda: _C10D.all_to_all_single(x, received, sent, group), "all-to-all", group)()


def _send(x: Tensor, group: str, what: str, send: Callable[[Tensor], Tensor]) -> Begun:
    if x.is_cuda and dist.get_backend(_group(group)) == "gloo":
        begun = _begin(lambda: send(x.cpu()), what, group)
        return lambda: begun().to(x.device)
    return _begin(lambda: send(x), what, group)


def _group(name: str) -> dist.ProcessGroup:
    group: dist.ProcessGroup = resolve_process_group(name)  # type: ignore[arg-type]
    return group


def _begin(send: Callable[[], Tensor], what: str, group: str) -> Begun:
    sent = _or_lost(send, what, group)
    return lambda: _or_lost(lambda: _C10D.wait_tensor(sent), what, group)


def _or_lost(do: Callable[[], Tensor], what: str, group: str) -> Tensor:
    try:
        return do()
    except RuntimeError as error:
        if not is_loss(error):
            raise
        raise lost(_group(group), f"complete the {what} of a program", error) from error

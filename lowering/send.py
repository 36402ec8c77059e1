"""torch's functional collectives along dimension 0, waited for.

gloo takes the address of a card's memory for one of the host in the operators that gather and reduce-scatter
(torch issue 152645), which ends the process; what is on a card passes through the host there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives  # registers the meta kernels of _c10d_functional
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group

_C10D = torch.ops._c10d_functional


def reduce_all(x: Tensor, op: str, group: str) -> Tensor:
    """The elementwise reduction over the ranks, of the same shape."""
    return _wait(_C10D.all_reduce(x, op, group))


def gather_rows(x: Tensor, ranks: int, group: str) -> Tensor:
    """The rows of all ranks, who have as many each."""
    return _send(x, group, lambda a: _C10D.all_gather_into_tensor(a, ranks, group))


def reduce_scatter_rows(x: Tensor, ranks: int, group: str) -> Tensor:
    """This rank's rows of the sum over the ranks, who get as many each."""
    return _send(x, group, lambda a: _C10D.reduce_scatter_tensor(a, "sum", ranks, group))


def exchange_rows(x: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
    """So many rows from each rank, for so many to each."""
    return _wait(_C10D.all_to_all_single(x, received, sent, group))


def _send(x: Tensor, group: str, send: Callable[[Tensor], Tensor]) -> Tensor:
    if x.is_cuda and _is_gloo(group):
        return _wait(send(x.cpu())).to(x.device)
    return _wait(send(x))


def _is_gloo(group: str) -> bool:
    return dist.get_backend(_resolve_process_group(group)) == "gloo"  # type: ignore[arg-type]


def _wait(pending: Tensor) -> Tensor:
    result: Tensor = _C10D.wait_tensor(pending)
    return result

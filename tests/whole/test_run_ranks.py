"""The helper that runs functions on several processes: failures and hangs are reported, and it goes on."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.helpers.run_ranks import SpmdError, run_spmd


def fail_on_one_rank(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("on purpose")
    dist.barrier()


def hang() -> None:
    if dist.get_rank() == 0:
        dist.barrier()


def get_rank() -> int:
    return dist.get_rank()


def test_spmd_reports_failures_and_hangs_and_goes_on() -> None:
    with pytest.raises(SpmdError, match=r"rank 1 of 2 in fail_on_one_rank:(.|\n)*on purpose") as caught:
        run_spmd(fail_on_one_rank, 2, 1)
    assert isinstance(caught.value.__cause__, ValueError) and caught.value.rank == 1
    with pytest.raises(SpmdError, match=r"ranks \[0\] gave no answer in 2 s"):
        run_spmd(hang, 2, timeout=2)
    assert run_spmd(get_rank, 2) == [0, 1]

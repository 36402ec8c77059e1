"""Starts the processes of an example: two on this machine, or those that torchrun has started."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(minutes=5)


def launch(main: Callable[[], None], ranks: int = 2) -> None:
    """Calls ``main()`` in every process of a gloo group, and exits with an error if it fails in any.

    Args:
        main: a function of a module, so that a new process can find it.
        ranks: how many processes to start; torchrun's number counts if it started this one.
    """
    torch.set_num_threads(1)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # ranks share the cores
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo", timeout=TIMEOUT)
        _run(main)
        return
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # The store takes a free port and keeps it; the processes meet there.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    try:
        mp.spawn(_join, args=(ranks, store.port, main), nprocs=ranks)
    except mp.ProcessRaisedException as error:
        sys.exit(f"rank {error.error_index} of {ranks} failed:{error}")
    except mp.ProcessExitedException as error:
        sys.exit(f"rank {error.error_index} of {ranks} died: {error}")


def say(text: str = "") -> None:
    """Prints on rank 0 only, at once."""
    if dist.get_rank() == 0:
        print(text, flush=True)


@contextmanager
def shared_folder() -> Iterator[str]:
    """A temporary folder of all ranks, which stays until the last of them has left the block."""
    with tempfile.TemporaryDirectory() as own:
        folders = [own]
        dist.broadcast_object_list(folders)
        yield folders[0]
        dist.barrier()


def _join(rank: int, ranks: int, port: int, main: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    _run(main)


def _run(main: Callable[[], None]) -> None:
    main()
    dist.barrier()  # nobody leaves while another rank still needs it
    dist.destroy_process_group()

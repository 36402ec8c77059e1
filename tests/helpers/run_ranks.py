"""Runs a function on several ranks, as processes of this machine that talk over gloo.

    def check(width: int) -> float:          # module-level: it travels by its import path
        x = torch.ones(width) * dist.get_rank()
        ...

    results = run_spmd(check, 2, 16)         # one result per rank

Starting python and torch takes seconds, so the processes are kept, per number of ranks, until this one ends,
and are forked from a server that has imported what most of them need and done nothing else: a new group takes
a fraction of a second. Environment variables are those of the first start.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing
import multiprocessing.context
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

# By rank: (True, result), or (False, name of the exception's type, traceback, exception or None).
Answers = dict[int, tuple[Any, ...]]

_START_TIMEOUT = 120.0
_GRACE = 5.0  # for the other ranks to answer, once one has failed
_LEAVE = 3.0  # for idle ranks to leave by themselves
_PRELOAD = [
    *("torch._dynamo", "tests.on_ranks.models", "transformers.models.llama.modeling_llama", "pytest"),
    # What torch imports while it traces or compiles for the first time.
    *("torch._inductor.debug", "torch._inductor.pattern_matcher", "torch._dynamo.repro.after_dynamo"),
    *("torch.distributed.tensor.experimental", "sympy.tensor.tensor"),
]
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # ranks are daemons, and can't start Inductor's own workers
    # As of now, not what the first test that needs ranks has set for itself.
    **{name: os.environ[name] for name in ("TPCOMPILE_CACHE", "TPCOMPILE_CACHE_DIR") if name in os.environ},
}


class SpmdError(RuntimeError):
    """A rank failed; its own exception is the cause (`__cause__`) where it could be sent."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class Workers:
    """Processes in one gloo group that run functions one after another, each function on all ranks.

    Never forked from this process: the threads that torch and gloo may have started do not survive a fork.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        # The store lives here, on a port that the system picks: nothing can take the port in between.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        with forkserver() as context:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=_serve, args=(rank, world_size, self._store.port, theirs), daemon=True
                )
                process.start()
                theirs.close()  # else a dead rank's pipe would not read as closed
                self._processes.append(process)
                self._pipes.append(ours)
        self.run(_nothing, timeout=_START_TIMEOUT)

    @property
    def alive(self) -> bool:
        """Whether every rank can take another function."""
        return bool(self._processes) and all(process.is_alive() for process in self._processes)

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """Calls `fn(*args)` on every rank; the results by rank. Failures are raised here as `SpmdError`."""
        job = pickle.dumps((fn, args))
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send_bytes(job)
            except OSError as error:
                self.close()
                raise SpmdError(f"rank {rank} had died before {fn.__qualname__} began", rank) from error
        answers = self._collect(timeout)
        failed = {rank: answer for rank, answer in answers.items() if not answer[0]}
        if not failed and len(answers) == self.world_size:
            return [answers[rank][1] for rank in range(self.world_size)]
        # Ranks that failed alike are in step still; otherwise a collective may be left half done.
        if len(failed) < self.world_size or len({answer[1] for answer in failed.values()}) > 1:
            self.close()
        raise self._error(fn.__qualname__, answers, failed, timeout)

    def close(self) -> None:
        """Ends the processes: idle ones leave when their pipe closes, the others are killed."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + _LEAVE
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []

    def _collect(self, timeout: float) -> Answers:
        answers: Answers = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.world_size and (left := deadline - time.monotonic()) > 0:
            open_pipes = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            for ready in wait(list(open_pipes), left):
                assert isinstance(ready, Connection)
                answer = _receive(ready)
                answers[open_pipes[ready]] = answer
                if not answer[0]:
                    deadline = min(deadline, time.monotonic() + _GRACE)
        return answers

    def _error(self, name: str, answers: Answers, failed: Answers, timeout: float) -> SpmdError:
        silent = [rank for rank in range(self.world_size) if rank not in answers]
        if not failed:
            return SpmdError(
                f"{name}: ranks {silent} gave no answer in {timeout:g} s, and were killed", silent[0]
            )
        texts = [f"rank {rank} of {self.world_size} in {name}:\n{failed[rank][2]}" for rank in sorted(failed)]
        if silent:
            texts.append(f"ranks {silent} were still waiting, and were killed")
        error = SpmdError("\n".join(texts), min(failed))
        error.__cause__ = failed[min(failed)][3]
        return error


_pools: dict[int, Workers] = {}


def run_spmd(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Calls the module-level function `fn(*args)` on `world_size` ranks and returns the results by rank.

    `fn` finds its rank and the gloo group in `torch.distributed`. Arguments and results are pickled.
    """
    pool = _pools.get(world_size)
    if pool is None or not pool.alive:
        if pool is not None:
            pool.close()
        pool = _pools[world_size] = Workers(world_size)
    return pool.run(fn, *args, timeout=timeout)


def run_alone(fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> Any:
    """Calls the module-level function `fn(*args)` in a process of its own, which has no group."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(fn, *args).result(timeout)


@atexit.register
def close_pools() -> None:
    """Ends all kept processes."""
    for pool in _pools.values():
        pool.close()
    _pools.clear()


@contextlib.contextmanager
def as_torchrun() -> Iterator[None]:
    """The environment of a rank that torchrun has started."""
    here = {"RANK": dist.get_rank(), "LOCAL_RANK": dist.get_rank(), "WORLD_SIZE": dist.get_world_size()}
    here |= {"LOCAL_WORLD_SIZE": dist.get_world_size()}
    with _environment({name: str(value) for name, value in here.items()}):
        yield


def _serve(rank: int, world_size: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=600)
    )
    gc.freeze()  # as in conftest
    with contextlib.suppress(EOFError, OSError):  # the parent has closed the pipe, or is gone
        while True:
            pipe.send_bytes(_answer(pipe.recv_bytes()))


def _answer(job: bytes) -> bytes:
    try:
        fn, args = pickle.loads(job)
        _destroy_groups()
        torch.manual_seed(0)
        return pickle.dumps((True, fn(*args)))
    except BaseException as error:
        text = traceback.format_exc()
        return pickle.dumps((False, type(error).__qualname__, text, _portable(error)))
    finally:
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # the next function shall not see this one's compiled code


def _destroy_groups() -> None:
    """Ends the groups that the last function made, now that all ranks are done: their threads poll.

    What DTensor keeps of its operators names meshes, and meshes that are equal find each other's there: none
    may be found whose groups have ended.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
    if "torch.distributed.tensor" in sys.modules:
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()


def _portable(error: BaseException) -> BaseException | None:
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        return None
    return copy if isinstance(copy, BaseException) else None


def _receive(pipe: Connection) -> tuple[Any, ...]:
    try:
        answer: tuple[Any, ...] = pickle.loads(pipe.recv_bytes())
    except (EOFError, OSError):
        return (False, "died", "the process died without an answer", None)
    return answer


def _nothing() -> None:
    dist.barrier()


@contextlib.contextmanager
def forkserver() -> Iterator[multiprocessing.context.ForkServerContext]:
    """What starts processes that have imported torch already; inside, the environment is as they need it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with _environment(_ENVIRONMENT):
        yield context


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Sets environment variables for the processes that are started inside: torch reads them on import."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)

"""What the ranks do in ``test_lost_ranks``: one of them skips calls, makes other ones, or ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import tpcompile
from tests.helpers.toys import Mlp
from tests.on_ranks.module_life import refusal

LIMIT = 2.0
"""Seconds that ranks wait for each other."""

X = torch.linspace(-1, 1, 24).reshape(2, 12)


def sharded(timeout: float | timedelta = LIMIT, **options: Any) -> Any:
    """A small model over a group of its own: that of the last one has failed.

    It has run four times: the order of calls is not compared at the next one, which shows what else tells.
    """
    torch.manual_seed(0)
    group = options.pop("group", None) or dist.new_group()
    mesh = DeviceMesh.from_group(group, "cpu")
    model = tpcompile.parallelize(Mlp(), mesh, (X,), timeout=timeout, **options)
    for _ in range(4):
        model(X)
    return model


def apart(first: Callable[[Any], Any], second: Callable[[Any], Any], **options: Any) -> str:
    """What a rank is told that does something else with the model than the other."""
    model = sharded(**options)
    told = refusal(lambda: (second if dist.get_rank() else first)(model))
    dist.barrier()  # in another group, which is as it was
    return told


def out_of_step() -> list[str]:
    """One rank does something else with the model than the other; afterwards they can start again."""

    def call(model: Any) -> Any:
        return model(X)

    def train(model: Any) -> Any:
        return model(X).sum().backward()

    def nothing(model: Any) -> Any:
        return None

    def gather(model: Any) -> Any:
        return model.full_state_dict()

    def capture(model: Any) -> Any:
        return model.capture(X[None])

    def late(model: Any) -> Any:
        time.sleep(2 * LIMIT)
        return model(X)

    def ahead(model: Any) -> Any:
        y = model(X.requires_grad_())
        return y.sum().backward() if dist.get_rank() == 0 else None

    def log(model: Any) -> Any:
        return model.up.weight.norm()

    def step(model: Any) -> Any:
        torch.optim.SGD(model.parameters(), 0.1).step()

    messages = [
        apart(call, nothing),
        apart(ahead, ahead),
        apart(capture, train),
        apart(call, late, timeout=timedelta(seconds=LIMIT)),
        apart(gather, capture),
        apart(log, call),
        apart(step, call),
    ]
    group = dist.new_group()
    if dist.get_rank() == 0:
        messages.append(refusal(lambda: sharded(timeout=0.4, group=group)))
    dist.barrier()
    return messages


def ends(how: str, when: str) -> None:
    """The last rank ends; the others say so."""
    model = sharded(timeout=60, compile={"backend": "aot_eager"} if when == "run compiled" else False)
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(1) if how == "exit" else os.kill(os.getpid(), signal.SIGKILL)
    model.capture(X[None]) if when == "capture" else model(X)


def waits_as_its_group(seconds: float) -> float:
    """A group of the user's with a shorter limit than the model's: how long a rank waits."""
    model = sharded(timeout=60, group=dist.new_group(timeout=timedelta(seconds=seconds)))
    begin = time.monotonic()
    if dist.get_rank() == 0:
        assert "did not take part" in refusal(lambda: model(X))
    dist.barrier()
    return time.monotonic() - begin

"""Seconds of what was recorded, on a device: in the roofline model, one after the other and overlapping."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from tpcompile.planner.dry_run.devices import Device
from tpcompile.planner.dry_run.estimate import Time
from tpcompile.planner.search.cost import CostModel

from .recorder import Operation, Transfer


def time_of(events: Sequence[Operation], device: Device) -> Time:
    """The seconds of a run, by what each operator waits for."""
    parts = {"compute": 0.0, "memory": 0.0, "launch": 0.0, "communication": 0.0}
    elementwise = 0.0
    bounds = [_bound(event, device) for event in events]
    for event, (bound, seconds) in zip(events, bounds, strict=True):
        parts[bound] += seconds
        elementwise += seconds if event.fused else 0.0
    could_overlap = sum(parts.values()) - _overlapped(events, [seconds for _, seconds in bounds])
    return Time(**parts, could_overlap=could_overlap, elementwise=elementwise)


def _bound(event: Operation, device: Device) -> tuple[str, float]:
    """What an operator waits for, and how long."""
    if event.sent is not None:
        return "communication", sending(event.sent, device.cost)
    times = {
        "compute": event.operations / device.flops(event.dtype),
        "memory": device.cost.touch(event.traffic),
        "launch": device.cost.launch,
    }
    most = max(times, key=times.__getitem__)
    return most, times[most]


def sending(sent: Transfer, cost: CostModel) -> float:
    """Seconds of a collective."""
    near = cost.near(sent.axes, sent.axis_sizes)
    if sent.kind == "all_reduce":
        return cost.all_reduce(sent.bytes, sent.ranks, near)
    if sent.kind == "all_to_all":
        return cost.all_to_all(sent.bytes, sent.ranks, near)
    return cost.all_gather(sent.bytes, sent.ranks, near)


def _overlapped(events: Sequence[Operation], seconds: Sequence[float]) -> float:
    """Seconds of a run in which collectives run beside operators.

    Both go in the order of the program; those whose operands are not there yet are passed over.
    """
    readers: list[list[int]] = [[] for _ in events]
    missing = [len(event.after) for event in events]
    for number, event in enumerate(events):
        for before in event.after:
            readers[before].append(number)
    ready: tuple[list[int], list[int]] = ([], [])
    for number, count in enumerate(missing):
        if count == 0:
            ready[events[number].sent is not None].append(number)
    free, running, now = [0.0, 0.0], list[tuple[float, int]](), 0.0
    while True:
        for lane in (0, 1):
            if ready[lane] and free[lane] <= now:
                number = heapq.heappop(ready[lane])
                free[lane] = now + seconds[number]
                heapq.heappush(running, (free[lane], number))
        if not running:
            return now
        now, done = heapq.heappop(running)
        for reader in readers[done]:
            missing[reader] -= 1
            if missing[reader] == 0:
                heapq.heappush(ready[events[reader].sent is not None], reader)

"""Measures what the ranks of a mesh and their links can do, as a cost model for plans."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from tpcompile.ir.check import checked
from tpcompile.ranks.mesh import Axis, check_mesh, local_device
from tpcompile.ranks.mesh_axis import line_of

from .cost import CostModel

_ROUNDS = 5  # of which the median counts


@dataclass(frozen=True)
class _Sizes:
    """What is measured on a kind of device: enough to be bound by what is meant, and quick still.

    Attributes:
        dtype: of the matmul, as models are run there.
        matmul: tokens, inputs and outputs of a linear layer.
        copied: bytes of a copy, more than the caches hold.
        reduced: bytes of three all-reduces: one that is all latency, and two that span a line.
        repeats: how often a call is made between two readings of the clock.
    """

    dtype: torch.dtype
    matmul: tuple[int, int, int]
    copied: int
    reduced: tuple[int, int, int]
    repeats: int


_CPU = _Sizes(torch.float32, (256, 1024, 1024), 1 << 26, (1 << 10, 1 << 20, 1 << 23), 2)
_ACCELERATOR = _Sizes(torch.bfloat16, (4096, 4096, 4096), 1 << 28, (1 << 10, 1 << 23, 1 << 26), 10)


@checked
def calibrate(mesh: DeviceMesh, axis: Axis | None = None) -> CostModel:
    """Measures a mesh, in a few seconds, and returns a cost model for ``parallelize`` and ``plan``.

    Measured are matmuls and a copy, on all ranks at once, and all-reduces over the axis. Medians count,
    of the slowest rank of the mesh given. All its ranks must call this, and get the same numbers.

    Args:
        mesh: the mesh that a model is to be divided over.
        axis: the axis of it, or a tuple of several, as for ``parallelize``.

    Raises:
        TpCompileError: there is no process group, this rank is not in the mesh, or it has no such axis.
    """
    check_mesh(mesh, axis)
    group, kind = line_of(mesh, axis).get_group(), mesh.device_type
    device = local_device(kind)
    meter = _Meter(device, _CPU if kind == "cpu" else _ACCELERATOR, group)
    with torch.no_grad():
        rates = torch.tensor(meter.rates(), dtype=torch.float64, device=device)
        for each in mesh.get_all_groups():
            dist.all_reduce(rates, dist.ReduceOp.MIN, group=each)
    flops, memory, reductions, bandwidth, calls = rates.tolist()
    name = f"calibrated {kind} x{dist.get_world_size(group)}"
    latency, launch = _rounded(1 / reductions), _rounded(1 / calls)
    return CostModel(name, _rounded(flops), _rounded(memory), latency, _rounded(bandwidth), launch)


class _Meter:
    """Times operations on one rank while the others do the same.

    Args:
        device: where.
        sizes: how much.
        group: the ranks that share the links.
    """

    def __init__(self, device: torch.device, sizes: _Sizes, group: dist.ProcessGroup) -> None:
        self.device, self.sizes, self.group = device, sizes, group

    def rates(self) -> list[float]:
        """Per second, on this rank: operations, bytes of memory, small all-reduces, bytes sent, calls."""
        memory = self.memory()
        small, *line = (self.all_reduce(size) for size in self.sizes.reduced)
        return [self.flops(), memory, 1 / small, self.bandwidth(line) or memory, self.calls()]

    def flops(self) -> float:
        """Operations per second of a linear layer."""
        tokens, inputs, outputs = self.sizes.matmul
        # Zeros would draw less power, and run faster, than a model does.
        x = torch.randn(tokens, inputs, device=self.device, dtype=self.sizes.dtype)
        weight = torch.randn(outputs, inputs, device=self.device, dtype=self.sizes.dtype)
        return 2 * tokens * inputs * outputs / self.seconds(lambda: F.linear(x, weight))

    def calls(self) -> float:
        """Matmuls per second that have next to nothing to do."""
        x = torch.randn(1, 1, device=self.device, dtype=self.sizes.dtype)
        return 1 / self.seconds(lambda: F.linear(x, x), repeats=100)

    def memory(self) -> float:
        """Bytes per second that a copy reads and writes."""
        source = torch.ones(self.sizes.copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * self.sizes.copied / self.seconds(lambda: target.copy_(source))

    def all_reduce(self, size: int) -> float:
        """Seconds to reduce a tensor of so many bytes."""
        x = torch.zeros(size // 4, device=self.device)  # zeros, which stay what they are when they add up
        return self.seconds(lambda: self._reduce(x), repeats=20 if size == self.sizes.reduced[0] else None)

    def bandwidth(self, line: list[float]) -> float:
        """Bytes sent per second, from the times of the two larger all-reduces; 0 where nothing is sent.

        The latency is the same in both, so that the difference is what the bytes take.
        """
        ranks = dist.get_world_size(self.group)
        sent = [2 * (ranks - 1) / ranks * size for size in self.sizes.reduced[1:]]
        # Where the smaller one was disturbed the difference is too small, or none: the larger one has a say.
        most = 2 * sent[1] / line[1]
        return min(most, (sent[1] - sent[0]) / (line[1] - line[0])) if line[1] > line[0] else most

    def seconds(self, do: Callable[[], object], repeats: int | None = None) -> float:
        """The median time of a call, after one for warming up, begun by all ranks together."""
        repeats = repeats or self.sizes.repeats
        gate = torch.zeros(1, device=self.device)
        do()
        times = []
        for _ in range(_ROUNDS):
            self._reduce(gate)
            self._finish()
            start = time.perf_counter()
            for _ in range(repeats):
                do()
            self._finish()
            times.append((time.perf_counter() - start) / repeats)
        return statistics.median(times)

    def _reduce(self, x: Tensor) -> None:
        dist.all_reduce(x, group=self.group)

    def _finish(self) -> None:
        """Waits for what runs on the device: it takes orders faster than it carries them out."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


def _rounded(number: float) -> float:
    """Three digits: the others are noise."""
    return float(f"{number:.2e}")

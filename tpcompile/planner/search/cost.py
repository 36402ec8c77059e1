"""The modelled time of arithmetic, memory traffic and collectives on one mesh axis.

Arithmetic and memory follow the roofline model (Williams et al., 2009); collectives cost a latency
plus the bytes that a ring moves per rank over the link's bandwidth (Thakur et al., 2005).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from tpcompile.errors import TpCompileError
from tpcompile.ir.check import Must, NotNegative, checked_fields
from tpcompile.ir.placements import Owned, Partial, Placement, Replicate, Shard

Rate = Annotated[float, Must("a positive number", lambda x: x > 0)]
"""Something per second; ``inf`` where it costs nothing."""


@checked_fields
@dataclass(frozen=True)
class CostModel:
    """What one rank and its links can do.

    Attributes:
        name: how a plan names it.
        flops: arithmetic, operations per second per rank.
        memory: memory bandwidth, bytes per second per rank.
        latency: seconds that any collective takes at least.
        bandwidth: bytes per second that a rank can send (and receive at the same time).
        launch: seconds that any call takes at least; what counts where calls can be saved.
    """

    name: str
    flops: Rate
    memory: Rate
    latency: NotNegative
    bandwidth: Rate
    launch: NotNegative = 2e-6

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds to reduce ``size`` bytes to every rank."""
        return self.latency + 2 * (ranks - 1) / ranks * size / self.bandwidth

    def all_gather(self, size: float, ranks: int) -> float:
        """Seconds to gather ``size`` bytes (the whole) on every rank; a reduce-scatter takes as long."""
        return self.latency + (ranks - 1) / ranks * size / self.bandwidth

    def all_to_all(self, size: float, ranks: int) -> float:
        """Seconds to change the divided dimension of a value of ``size`` bytes."""
        return self.latency + (ranks - 1) / ranks**2 * size / self.bandwidth

    def touch(self, size: float) -> float:
        """Seconds to read or write ``size`` bytes."""
        return size / self.memory

    def reshard(
        self, src: Placement, dst: Placement, size: float, ranks: int, *, statistic: bool = False
    ) -> float:
        """Seconds to change a value of ``size`` bytes (whole) from one placement to another.

        Infinite where no collective does it (out of a maximum into summands, say). A ``statistic``
        (one number per row, as in a norm) is small and usually travels with others: its all-reduce
        counts a quarter of the latency.
        """
        if src == dst:
            return 0.0
        match src, dst:
            case Replicate(), Shard():
                return self.touch(size / ranks) + 1e-9
            case Replicate(), Owned():
                return 1e-9
            case Owned(), Partial(op="sum"):  # a mask, which a compiler fuses
                return 2e-9
            case Owned(), Replicate():
                return 2e-9 + self.all_reduce(size, ranks)
            case Replicate(), Partial(op="sum"):
                return self.touch(size) + 2e-9
            case Shard(), Replicate():
                return self.all_gather(size, ranks)
            case Shard(), Shard():
                return self.all_to_all(size, ranks)
            case Partial(), Replicate():
                return self.all_reduce(size, ranks) - (0.75 * self.latency if statistic else 0.0)
            case Partial(op="sum"), Shard():
                return self.all_gather(size, ranks)
            case _:
                return math.inf


PRESETS = {
    # Dense bf16 rates x 0.6, HBM bandwidths x 0.9, NCCL ring bandwidths per GPU within one NVLink node (0.8
    # of the links), and what a kernel costs beyond its work. In NVIDIA's data sheets, H100 SXM, H200 SXM,
    # HGX B200 (an eighth of it) and A100 80GB SXM have 989, 989, 2250 and 312 TFLOPS, 3.35, 4.8, 7.7 and 2.0
    # TB/s, and NVLink of 450, 450, 900 and 300 GB/s in each direction.
    "h100": CostModel("h100", 594e12, 3.0e12, 12e-6, 370e9, 3e-6),
    "h200": CostModel("h200", 594e12, 4.3e12, 12e-6, 370e9, 3e-6),
    "b200": CostModel("b200", 1350e12, 7.0e12, 12e-6, 740e9, 3e-6),
    "a100": CostModel("a100", 187e12, 1.8e12, 15e-6, 230e9, 4e-6),
    # One thread per rank; gloo over the loopback device.
    "cpu": CostModel("cpu", 5e10, 8e9, 1.5e-4, 1.0e9, 2e-6),
}


def preset(name: str) -> CostModel:
    """A cost model by name (``h100``, ``h200``, ``b200``, ``a100``, ``cpu``).

    Raises:
        TpCompileError: there is no such preset.
    """
    if name not in PRESETS:
        raise TpCompileError(
            f"no cost model named {name!r}", where="cost_model", todo=f"use one of {', '.join(PRESETS)}"
        )
    return PRESETS[name]

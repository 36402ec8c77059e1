"""The modelled time of arithmetic, memory traffic and collectives on one mesh axis.

Arithmetic and memory follow the roofline model (Williams et al., 2009); collectives cost a latency
plus the bytes that a ring moves per rank over the link's bandwidth (Thakur et al., 2005). Between nodes a
ring has a strand for each of the group's ranks on a node, and each strand an adapter of its own.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        node: how many ranks in a row are on one node, where ``latency`` and ``bandwidth`` hold; None: all.
        far_latency: seconds that a collective over several nodes takes at least; None: as within one.
        far_bandwidth: bytes per second that a rank can send to other nodes; None: as within one.
    """

    name: str
    flops: Rate
    memory: Rate
    latency: NotNegative
    bandwidth: Rate
    launch: NotNegative = 2e-6
    node: Annotated[int, Must("a number of ranks", lambda n: n > 0)] | None = None
    far_latency: NotNegative | None = None
    far_bandwidth: Rate | None = None

    def near(self, axes: Sequence[int], axis_sizes: Sequence[int]) -> int | None:
        """How many ranks of a group over sub-axes share a node, at the least; None if all do in every group.

        Args:
            axes: the sub-axes along which the ranks of a group lie apart.
            axis_sizes: the sizes of all sub-axes, major first: ranks are numbered along them.
        """
        return None if self.node is None else _near(self.node, tuple(axes), tuple(axis_sizes))

    def all_reduce(self, size: float, ranks: int, near: int | None = None) -> float:
        """Seconds to reduce ``size`` bytes to every rank; for ``near`` see there, here and below."""
        return self._least(near) + 2 * (ranks - 1) / ranks * size / self._ring(near)

    def all_gather(self, size: float, ranks: int, near: int | None = None) -> float:
        """Seconds to gather ``size`` bytes (the whole) on every rank; a reduce-scatter takes as long."""
        return self._least(near) + (ranks - 1) / ranks * size / self._ring(near)

    def all_to_all(self, size: float, ranks: int, near: int | None = None) -> float:
        """Seconds to change the divided dimension of a value of ``size`` bytes."""
        inside = ranks if near is None else near
        seconds = (inside - 1) / ranks**2 * size / self.bandwidth
        if near is not None:  # every rank's own adapter, while it sends within the node
            seconds = max(seconds, (ranks - near) / ranks**2 * size / self._far)
        return self._least(near) + seconds

    @property
    def _far(self) -> float:
        return self.bandwidth if self.far_bandwidth is None else self.far_bandwidth

    def _least(self, near: int | None) -> float:
        return self.latency if near is None or self.far_latency is None else self.far_latency

    def _ring(self, near: int | None) -> float:
        return self.bandwidth if near is None else min(self.bandwidth, near * self._far)

    def touch(self, size: float) -> float:
        """Seconds to read or write ``size`` bytes."""
        return size / self.memory

    def reshard(
        self,
        src: Placement,
        dst: Placement,
        size: float,
        ranks: int,
        near: int | None = None,
        *,
        statistic: bool = False,
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
                return 2e-9 + self.all_reduce(size, ranks, near)
            case Replicate(), Partial(op="sum"):
                return self.touch(size) + 2e-9
            case Shard(), Replicate():
                return self.all_gather(size, ranks, near)
            case Shard(), Shard():
                return self.all_to_all(size, ranks, near)
            case Partial(), Replicate():
                spared = 0.75 * self._least(near) if statistic else 0.0
                return self.all_reduce(size, ranks, near) - spared
            case Partial(op="sum"), Shard():
                return self.all_gather(size, ranks, near)
            case _:
                return math.inf


@functools.cache
def _near(node: int, axes: tuple[int, ...], axis_sizes: tuple[int, ...]) -> int | None:
    strides = [math.prod(axis_sizes[a + 1 :]) for a in range(len(axis_sizes))]
    groups: dict[int, Counter[int]] = {}
    for rank in range(math.prod(axis_sizes)):
        group = rank - sum(rank // strides[a] % axis_sizes[a] * strides[a] for a in axes)
        groups.setdefault(group, Counter())[rank // node] += 1
    return min((min(nodes.values()) for nodes in groups.values() if len(nodes) > 1), default=None)


# Latency between nodes, and bandwidth of a rank's own adapter: 0.8 of 400 Gbit/s for each GPU (DGX H100, H200
# and B200) or 200 Gbit/s (DGX A100), by NVIDIA's data sheets. An all-reduce of two nodes waits twice for the
# network, which is 10 us each time in NCCL's own model (its file graph/tuning.cc, rings, protocol Simple).
_FAR = {"h100": (32e-6, 40e9), "h200": (32e-6, 40e9), "b200": (32e-6, 40e9), "a100": (35e-6, 20e9)}

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
    """A cost model by name (``h100``, ``h200``, ``b200``, ``a100``, ``cpu``), or for nodes of 8 (``h100x8``).

    Raises:
        TpCompileError: there is no such preset, or nobody knows its links between nodes.
    """
    found = find_preset(name)
    if found is None:
        names = f"{', '.join(PRESETS)}; for nodes of 8 ranks {', '.join(f'{each}x8' for each in _FAR)}"
        raise TpCompileError(f"no cost model named {name!r}", where="cost_model", todo=f"use one of {names}")
    return found


def find_preset(name: str) -> CostModel | None:
    """The same, or None."""
    base, _, node = name.partition("x")
    if name in PRESETS:
        return PRESETS[name]
    if base not in _FAR or not node.isdecimal() or not 0 < int(node) <= 4096:
        return None
    latency, bandwidth = _FAR[base]
    return replace(PRESETS[base], name=name, node=int(node), far_latency=latency, far_bandwidth=bandwidth)

"""What a device has: memory, and rates by the type that it computes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from tpcompile.errors import TpCompileError
from tpcompile.ir.check import short
from tpcompile.planner.search.cost import PRESETS, CostModel, find_preset


@dataclass(frozen=True)
class Device:
    """A device that a rank computes on.

    Attributes:
        cost: its rates, and those of its links.
        memory: bytes that it has; None where that is not known.
        rates: of a type, the share of ``cost.flops`` that it computes at; 1 for types that are not listed.
        rests_on: where the numbers come from, as a sentence.
    """

    cost: CostModel
    memory: float | None = None
    rates: Mapping[torch.dtype, float] = field(default_factory=dict)
    rests_on: str = "rates as given in the cost model, the same for every type"

    @property
    def name(self) -> str:
        """How an estimate names it."""
        return self.cost.name

    @property
    def accelerator(self) -> bool:
        """Whether it is one: a CPU is called so, a calibrated one too."""
        return "cpu" not in self.name.split()

    def flops(self, dtype: torch.dtype) -> float:
        """Operations per second in a type."""
        return self.cost.flops * self.rates.get(dtype, 1.0)


def _sheet(name: str, memory: float, bf16: float, single: float, double: float, eighth: float) -> Device:
    """A device by its vendor's data sheet: bytes, and dense TFLOPS of bf16, fp32, fp64 and fp8."""
    eights = (torch.float8_e4m3fn, torch.float8_e5m2)
    rates = {torch.float32: single / bf16, torch.float64: double / bf16, **{t: eighth / bf16 for t in eights}}
    source = f"{name}: sizes and peak rates of the vendor's data sheet, of which a share is reached (preset)"
    return Device(PRESETS[name], memory, rates, source)


DEVICES = {
    # NVIDIA H100 Tensor Core GPU data sheet, H100 SXM: 80 GB, 989 / 67 / 67 / 1979 TFLOPS without sparsity.
    # fp32 is the ordinary cores' (torch uses TF32 for matmuls only if told to), fp64 the tensor cores'.
    "h100": _sheet("h100", 80e9, 989, 67, 67, 1979),
    # NVIDIA H200 Tensor Core GPU data sheet, H200 SXM: 141 GB, otherwise as H100.
    "h200": _sheet("h200", 141e9, 989, 67, 67, 1979),
    # NVIDIA HGX B200 data sheet, an eighth of the board: 180 GB, 2250 / 75 / 37 / 4500 TFLOPS, no sparsity.
    "b200": _sheet("b200", 180e9, 2250, 75, 37, 4500),
    # NVIDIA A100 Tensor Core GPU data sheet, 80GB SXM: 312 / 19.5 / 19.5 TFLOPS; it has no fp8.
    "a100": _sheet("a100", 80e9, 312, 19.5, 19.5, 312),
    "cpu": Device(
        PRESETS["cpu"],
        rests_on="cpu: one thread of an ordinary server, gloo over the loopback device (preset)",
    ),
}


def device_named(device: str | CostModel) -> Device:
    """A device by the name of a preset, or with the rates of a cost model.

    Raises:
        TpCompileError: there is no such preset.
    """
    cost = device if isinstance(device, CostModel) else find_preset(device)
    if cost is None:
        todo = f"use one of {', '.join(DEVICES)}; for nodes of 8 ranks h100x8"
        raise TpCompileError(f"no device named {short(device)}", where="device", todo=todo)
    base = DEVICES.get(cost.name.partition("x")[0])
    if base is None or cost != find_preset(cost.name):
        return Device(cost)
    if cost.node is None or cost.far_bandwidth is None:
        return base
    far = f"{cost.far_bandwidth / 1e9:g} GB/s of each rank between nodes of {cost.node}"
    return replace(base, cost=cost, rests_on=f"{base.rests_on}; {far}")

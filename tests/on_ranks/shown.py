"""What a sharded model shows of itself on a rank."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import tpcompile
from tests.helpers.toys import Attention, Mlp

Flops = dict[str, int]


def shown() -> tuple[str | None, str, str, str, dict[str, str], list[str], tuple[Flops, Flops]]:
    """In a notebook before anything is planned; as text; in a notebook, as a model, a program; in traces.

    Last the operations of a step by modules: of the model, and of this rank.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    whole = nn.Sequential(Mlp(20, 33), Mlp(20, 33)).eval()
    expected = _flops(whole)
    model = tpcompile.parallelize(whole, mesh)
    attention = tpcompile.parallelize(Attention(packed=False).eval(), mesh, (torch.zeros(2, 5, 20),))
    before = model._repr_html_()
    traced: dict[str, str] = {}
    handler = logging.Handler()
    handler.emit = lambda record: traced.update(_artifact(record))  # type: ignore[method-assign]
    log = logging.getLogger("torch.__trace")
    log.addHandler(handler)
    try:
        model(torch.zeros(2, 5, 20))
    finally:
        log.removeHandler(handler)
    return (
        before,
        repr(model),
        model._repr_html_() or "",
        model.programs[0]._repr_html_(),
        traced,
        _profiled(model),
        ({**expected, **_flops(Attention(packed=False))}, {**_flops(model), **_flops(attention)}),
    )


def _flops(model: nn.Module) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 5, 20)).sum().backward()
    return {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}


def _profiled(model: Any) -> list[str]:
    """The ranges of a call in the profiler, in their order."""
    x = torch.randn(2, 5, 20)
    wanted = model(x)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        assert torch.equal(model(x), wanted)
    events = sorted(found.events(), key=lambda event: event.time_range.start)
    return [event.name for event in events if event.name[:1].isdigit()]


def _artifact(record: Any) -> dict[str, str]:
    found = record.metadata.get("artifact", {})
    return {found["name"]: record.payload} if found.get("name", "").startswith("tpcompile_") else {}

"""What parameters that say what they are cost: steps, optimizers and clipping, beside plain parameters.

    python benchmarks/sharded_parameters.py [--layers 75] [--width 256] [--rows 64] [--rounds 20]

One rank, on a CPU, over gloo: what is measured is the work around the arithmetic, which is nearly constant,
so that ratios fall with the width. Both sides run the same program; the plain side's modules hold plain
parameters, which the program reads as attributes. Times are those of this process on the CPU, medians over
interleaved rounds in which each side comes first in turn, so that what else the machine does counts little.

Set ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_MMAP_THRESHOLD_`` to 4000000000: glibc gives memory back to the
system when gradients are dropped that lie at its end, and page faults are up to a third of that model's step.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import tpcompile


def models(layers: int, width: int, rows: int) -> tuple[Any, Any]:
    """The same sharded model twice; the second one with plain parameters."""
    torch.manual_seed(0)
    whole = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    mesh = init_device_mesh("cpu", (1,))
    x = torch.randn(rows, width)
    sharded, plain = (tpcompile.parallelize(copy.deepcopy(whole), mesh, (x,)) for _ in range(2))
    for module in plain.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = parameter.to_local()
    plain._tp.rebind(foreign=True)
    return sharded, plain


def interleaved(pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]], rounds: int) -> None:
    """Prints the median times of both sides of each pair, and the median of their ratios."""
    for name, both in pairs.items():
        times: list[tuple[float, float]] = []
        for at in range(rounds + 3):
            found = [0.0, 0.0]
            for side in (0, 1) if at % 2 else (1, 0):
                start = time.process_time()
                both[side]()
                found[side] = (time.process_time() - start) * 1e6
            times.append((found[0], found[1]))
        del times[:3]
        ours, plain = (median(side) for side in zip(*times, strict=True))
        ratio = median(a / b for a, b in times)
        print(f"{name:32} {ours:9.0f} us  plain {plain:9.0f} us  ratio {ratio:.3f}")


def steps(
    model: Any, run: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A forward, and a forward with backward."""

    def infer() -> None:
        with torch.no_grad():
            run(x)

    def train() -> None:
        model.zero_grad()
        run(x).sum().backward()

    return infer, train


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW foreach": lambda params: torch.optim.AdamW(params, foreach=True),
    "AdamW fused": lambda params: torch.optim.AdamW(params, fused=True),
    "SGD foreach": lambda params: torch.optim.SGD(params, 1e-3, momentum=0.9, foreach=True),
    "AdamW default": lambda params: torch.optim.AdamW(params),
}


def main() -> None:
    """Prints one line per thing that is measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=75)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, default=64)
    given = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    both = models(given.layers, given.width, given.rows)
    x = torch.randn(given.rows, given.width)
    eager = [steps(model, model, x) for model in both]
    compiled = [steps(model, torch.compile(model, fullgraph=True), x) for model in both]
    kinds = {"inference": 0, "training": 1}
    pairs: dict[str, Any] = {
        f"{what}, {kind}": tuple(each[at] for each in found)
        for what, found in (("eager", eager), ("compiled", compiled))
        for kind, at in kinds.items()
    }
    for each in both:
        each(x).sum().backward()
    for name, make in OPTIMIZERS.items():
        pairs[name] = tuple(make(each.parameters()).step for each in both)
    pairs["clip_grad_norm_"] = tuple(
        lambda each=each: nn.utils.clip_grad_norm_(each.parameters(), 1e9) for each in both
    )
    interleaved(pairs, given.rounds)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

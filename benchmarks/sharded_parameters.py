"""What parameters that say what they are cost: steps, optimizers and clipping, beside plain parameters.

    python benchmarks/sharded_parameters.py [--layers 100] [--width 64] [--rounds 30]

One rank, on a CPU, over gloo: what is measured is the work around the arithmetic. Both sides run the same
program; the plain side's modules hold plain parameters, which the program reads as attributes. Times are the
least of interleaved rounds, so that what else the machine does counts little.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import tpcompile


def models(layers: int, width: int) -> tuple[Any, Any]:
    """The same sharded model twice; the second one with plain parameters."""
    torch.manual_seed(0)
    whole = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    mesh = init_device_mesh("cpu", (1,))
    x = torch.randn(4, width)
    sharded, plain = (tpcompile.parallelize(copy.deepcopy(whole), mesh, (x,)) for _ in range(2))
    for module in plain.modules():
        for name, parameter in module._parameters.items():
            module._parameters[name] = parameter.to_local()
    plain._tp.rebind(foreign=True)
    return sharded, plain


def interleaved(pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]], rounds: int) -> None:
    """Prints the least times of both sides of each pair, and their ratio."""
    for name, both in pairs.items():
        times: list[list[float]] = [[], []]
        for at in range(rounds + 3):
            for run, found in zip(both, times, strict=True):
                start = time.perf_counter()
                run()
                if at >= 3:
                    found.append((time.perf_counter() - start) * 1e6)
        ours, plain = map(min, times)
        print(f"{name:32} {ours:9.0f} us  plain {plain:9.0f} us  ratio {ours / plain:.3f}")


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
    parser.add_argument("--layers", type=int, default=100)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    both = models(given.layers, given.width)
    x = torch.randn(4, given.width)
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

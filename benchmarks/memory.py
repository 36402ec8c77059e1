"""What a training step keeps: unsharded, on two ranks, with sequence parallelism, with layers recomputed.

    python -m benchmarks.memory [--layers 8] [--width 256] [--length 256]

Two processes over gloo, eager, float32: a llama with random weights, its loss, forward and backward. Bytes
are counted, not sampled, so that a busy machine changes nothing: of every tensor that an operator returns,
from then until it is freed. Weights and their gradients are there before the step, and do not count.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tpcompile
from benchmarks.megatron import Layer, Trained, llama
from benchmarks.predicted import local_parts
from tests.helpers.run_ranks import run_spmd
from tpcompile.runtime.dry_run.live_bytes import LiveBytes

RANKS = 2


class ByHand(Trained):
    """The hand-written module with its layers under torch's checkpointing."""

    def run(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        result: Tensor = checkpoint(layer, x, cos, sin, use_reentrant=False)
        return result

    def forward(self, input_ids: Tensor) -> Tensor:
        sizes = [self.head.shape[0]] * self.ranks
        return torch.ops.tpcompile.all_gather(self.logits(input_ids), self.group, 2, sizes, self.rank)


def measure(model: Any, logits: Callable[[Tensor], Tensor], ids: Tensor) -> tuple[int, int]:
    """The bytes kept between forward and backward, and the most that are there at once."""

    def loss() -> Tensor:
        return F.cross_entropy(logits(ids).flatten(0, 1), ids.flatten())

    loss().backward()  # so that gradients are there, and what is captured and cached
    live = LiveBytes()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    for each in local_parts((*model.parameters(), *grads, *model.buffers(), ids)):
        live.hold(each, counts=False)
    with live:
        result = loss()
        kept = live.live
        result.backward()
    return kept, live.peak


def measure_all(given: argparse.Namespace) -> None:
    """One rank's measurements; the first rank prints them."""
    torch.manual_seed(0)
    whole = llama(given.width, given.layers, given.width // 64, vocabulary=1024)
    ids = torch.randint(1024, (2, given.length))
    mesh = init_device_mesh("cpu", (RANKS,))

    def say(name: str, found: tuple[int, int]) -> None:
        if dist.get_rank() == 0:
            print(f"| {name} | {found[0] / 2**20:.1f} | {found[1] / 2**20:.1f} |", flush=True)

    def call(model: Any) -> Callable[[Tensor], Tensor]:
        return lambda x: model(input_ids=x, use_cache=False).logits

    for name in ("unsharded", "unsharded, checkpointed by torch"):
        model = copy.deepcopy(whole)
        if "," in name:
            model.gradient_checkpointing_enable()
        say(name, measure(model, call(model), ids))
    hand = ByHand(whole, dist.group.WORLD)  # type: ignore[arg-type]
    say("2 ranks, written by hand, checkpointed by torch", measure(hand, hand, ids))
    ways: dict[str, dict[str, Any]] = {
        "2 ranks": {},
        '2 ranks, `checkpointing="full"`': {"checkpointing": "full"},
        '2 ranks, `checkpointing="selective"`': {"checkpointing": "selective"},
        "2 ranks, sequence parallelism": {"sequence_parallel": True},
        '2 ranks, sequence parallelism, `"gathered"`': {
            "sequence_parallel": True,
            "checkpointing": "gathered",
        },
        '2 ranks, sequence parallelism, `"full"`': {"sequence_parallel": True, "checkpointing": "full"},
    }
    for name, options in ways.items():
        example = {"input_ids": ids, "use_cache": False}
        model = tpcompile.parallelize(copy.deepcopy(whole), mesh, example_kwargs=example, **options)
        say(name, measure(model, call(model), ids))


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()
    print("| | kept for backward, MiB | most at once, MiB |\n|---|---|---|")
    run_spmd(measure_all, RANKS, given, timeout=3600)


if __name__ == "__main__":
    main()

"""What a loss over a large vocabulary costs: logits that stay sharded, beside logits that are gathered.

    python -m benchmarks.loss [--vocabulary 131072] [--width 256] [--tokens 1024] [--rounds 7]

Two gloo processes of one thread run a head of a language model, forward and backward: with the loss in the
program, where its logits stay sharded; with the loss computed from the logits that the program returns,
which are gathered for it; and unsharded, on every rank at once. All give the same loss and gradients
(checked). They take turns. Times are the slower rank's, memory is what a step adds to what a rank holds at
most (Linux, of pages that it has touched).
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import tpcompile

Step = Callable[[], Tensor]


class Head(nn.Module):
    """The end of a language model: logits, and the loss of labels if there are any."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        logits = self.lm_head(x)
        return None if labels is None else loss_of(logits, labels), logits


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """As transformers computes it, of labels that are shifted already."""
    return F.cross_entropy(logits.float(), labels, ignore_index=-100)


def variants(asked: argparse.Namespace) -> dict[str, tuple[nn.Module, Step]]:
    """Models with a forward of each."""
    whole = Head(asked.width, asked.vocabulary)
    x = torch.randn(asked.tokens, asked.width, requires_grad=True)
    labels = torch.randint(0, asked.vocabulary, (asked.tokens,))
    inside, outside = (tpcompile.parallelize(copy.deepcopy(whole)) for _ in range(2))
    return {
        "sharded": (inside, lambda: inside(x, labels)[0]),
        "gathered": (outside, lambda: loss_of(outside(x)[1], labels)),
        "unsharded": (whole, lambda: loss_of(whole(x)[1], labels)),
    }


def measure(model: nn.Module, forward: Step) -> tuple[float, float, float]:
    """A step: its loss, its seconds, and the bytes that it adds at most."""
    model.zero_grad()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    dist.barrier()
    start = time.perf_counter()
    loss = forward()
    loss.backward()
    seconds = torch.tensor(time.perf_counter() - start)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return float(loss.detach()), float(seconds), max(_resident("VmHWM") - before, 1.0)


def _resident(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024.0


def run(rank: int, asked: argparse.Namespace) -> None:
    """One rank's share of all rounds; the first one prints."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(asked.port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=asked.ranks)
    found, rounds = variants(asked), list[dict[str, tuple[float, float, float]]]()
    for at in range(asked.rounds + 1):
        names = list(found) if at % 2 else list(reversed(found))
        rounds.append({name: measure(*found[name]) for name in names})
    del rounds[0]
    _check(found, rounds[0])
    if rank == 0:
        print("| logits | step, ms | time ratio | added at most, MiB | memory ratio |\n|---|---|---|---|---|")
        for name in found:
            time_ratio = median(one[name][1] / one["gathered"][1] for one in rounds)
            memory_ratio = median(one[name][2] / one["gathered"][2] for one in rounds)
            seconds, added = (median(one[name][i] for one in rounds) for i in (1, 2))
            row = (
                name,
                f"{seconds * 1e3:.0f}",
                f"{time_ratio:.3f}",
                f"{added / 2**20:.0f}",
                f"{memory_ratio:.3f}",
            )
            print("|", " | ".join(row), "|")
    dist.destroy_process_group()


def _check(found: dict[str, tuple[nn.Module, Step]], one: dict[str, tuple[float, float, float]]) -> None:
    """All variants have the same loss and gradients."""
    losses = [loss for loss, _, _ in one.values()]
    assert max(losses) - min(losses) < 1e-5 * losses[0], losses
    wanted = found["unsharded"][0].lm_head.weight.grad
    for name in ("sharded", "gathered"):
        grad = found[name][0].lm_head.weight.grad.full_tensor()
        assert (grad - wanted).abs().max() < 1e-5 * wanted.abs().max(), name


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = {"vocabulary": 131072, "width": 256, "tokens": 1024, "rounds": 7, "ranks": 2, "port": 29517}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    asked = parser.parse_args()
    mp.spawn(run, (asked,), nprocs=asked.ranks)


if __name__ == "__main__":
    main()

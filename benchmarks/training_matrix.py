"""Twenty steps of AdamW beside the unsharded model, in every way to train: how far they drift apart.

    python -m benchmarks.training_matrix [case ...] [--way compiled] [--steps 20]

Tiny random models of ``tests/helpers/families.py``, most of whose shapes are easy to get wrong (one key head,
three heads on two ranks, tied and packed weights, five experts; the vocabulary of 259 is odd in all), in
float32, on two ranks, and with data parallelism on 2 x 2. Every step has another batch, of another length.
Prints a markdown table: per case and way the largest difference of any step's loss, or what was refused.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tpcompile
from tests.helpers import families
from tests.helpers.run_ranks import run_spmd

CASES = ("llama", "one_kv_head", "three_heads", "tied", "phi3_one_kv_head", "mixtral_five_experts", "gpt2")
WAYS: dict[str, dict[str, Any]] = {
    "eager": {},
    "compiled": {"compile": True},
    "checkpointing": {"checkpointing": "full"},
    "sequence": {"sequence_parallel": True},
    "all of these": {"compile": True, "checkpointing": "full", "sequence_parallel": True},
    "FSDP2, 2 x 2": {},
    "DDP, 2 x 2": {},
}
"""Options of ``parallelize``; the loss is part of the program in all of them."""
RATE = 1e-3


def batch_of(step: int) -> Tensor:
    """Token ids of four lines, other ones in every step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(3, families.VOCAB, (4, 9 + step % 5), generator=generator)


def build(case: str) -> Any:
    """A case's model."""
    made = families.EDGE_CASES[case]() if case in families.EDGE_CASES else families.build(case)
    return made.train()


def train(model: nn.Module, steps: int, lines: slice = slice(None)) -> list[float]:
    """The losses of some steps."""
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=RATE), []
    for step in range(steps):
        ids = batch_of(step)[lines]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


def sharded(case: str, way: str, steps: int) -> list[float] | str:
    """On a rank: the losses, or what is refused."""
    try:
        model: Any = build(case)
        two = "2 x 2" in way
        mesh = init_device_mesh("cpu", (2, 2) if two else (1, 2), mesh_dim_names=("data", "tensor"))
        ids = batch_of(0)
        example = {"input_ids": ids, "labels": ids, "use_cache": False}
        tpcompile.parallelize(model, mesh, axis="tensor", example_kwargs=example, **WAYS[way])
        if way.startswith("FSDP2"):
            fully_shard(model, mesh=mesh["data"])
        elif two:
            model = DistributedDataParallel(model, process_group=mesh.get_group("data"))
        first = 2 * mesh.get_local_rank("data")
        return train(model, steps, slice(first, first + 2) if two else slice(None))
    except tpcompile.TpCompileError as error:
        return str(error).splitlines()[0]


def verdict(case: str, way: str, steps: int, expected: list[float]) -> str:
    """A cell of the table."""
    ranks = run_spmd(sharded, 4 if "2 x 2" in way else 2, case, way, steps, timeout=600)
    if isinstance(ranks[0], str):
        return f"refused: {ranks[0]}"
    # Replicas have half of the batch each, of as many labels: the loss of all is the mean of theirs.
    mine = torch.tensor(ranks, dtype=torch.float64).mean(0)
    return f"{float((mine - torch.tensor(expected, dtype=torch.float64)).abs().max()):.0e}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help=f"families or edge cases ({', '.join(CASES)})")
    parser.add_argument("--way", action="append", choices=list(WAYS), help="all of them")
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    ways = asked.way or list(WAYS)
    print(f"| | {' | '.join(ways)} |\n|---|{'---|' * len(ways)}", flush=True)
    for case in asked.cases or CASES:
        expected = train(build(case), asked.steps)
        cells = [verdict(case, way, asked.steps, expected) for way in ways]
        print(f"| {case} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""What travels between the ranks in one step: ours against Hugging Face's plan.

    python -m benchmarks.wire [--ranks 2] [--family llama]

Models are small (two layers, hidden size 64): the numbers are counts, and bytes per token in multiples of the
hidden size. The process group is torch's fake one, this process is rank 0 of ranks that do not exist; every
collective that is issued is seen by a dispatch mode. What a rank sends is counted as a ring does it: an
all-reduce of n bytes 2 (r - 1) / r n, an all-gather or a reduce-scatter of n bytes (the whole) half of that.

Hugging Face's rows need the package accelerate, which transformers wants for ``tp_plan``.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

import tpcompile

FAMILIES = ("llama", "qwen3", "phi3", "olmo2", "cohere", "glm", "phi")
HIDDEN, BATCH, LENGTH = 64, 2, 16


class Wire(TorchDispatchMode):
    """Counts collectives, and the bytes that this rank sends.

    What ranks compare with each other is not counted: it goes to one rank and back to all (``gather`` and
    ``broadcast`` of the group itself), and only now and then.

    Args:
        ranks: how many ranks share them.
    """

    def __init__(self, ranks: int) -> None:
        super().__init__()
        self.ranks = ranks
        self.count: Counter[str] = Counter()
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1].strip("_")
        compares = func.namespace == "c10d" and name in ("gather", "broadcast")
        if func.namespace in ("_c10d_functional", "c10d") and not compares:
            if "all_reduce" in name or "allreduce" in name:
                self._note("all_reduce", 2.0, args)
            elif "gather" in name:
                self._note("all_gather", 1.0, result)
            elif "reduce_scatter" in name:
                self._note("reduce_scatter", 1.0, args)
            elif "all_to_all" in name or "alltoall" in name:
                self._note("all_to_all", 1.0, args)
            elif "broadcast" in name:
                self._note("broadcast", 1.0, args)
        return result

    def _note(self, kind: str, passes: float, values: Any) -> None:
        sizes = [t.numel() * t.element_size() for t in tree_leaves(values) if isinstance(t, Tensor)]
        self.count[kind] += 1
        self.sent += passes * (self.ranks - 1) / self.ranks * max(sizes, default=0)

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} x {kind}" for kind, n in sorted(self.count.items()))
        return f"{kinds or 'nothing'} | {self.sent / (BATCH * LENGTH * HIDDEN * 4):.2f}"


def config_of(family: str) -> Any:
    """A small model; its vocabulary is four times its hidden size, so that the head does not outweigh all."""
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 4 * HIDDEN,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "glm":
        sizes["head_dim"] = 16
    return AutoConfig.for_model(family, **sizes, use_cache=False)


def step(call: Callable[[Tensor], Tensor], ranks: int) -> tuple[Wire, Wire]:
    """What a forward sends, and what its backward does."""
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
    forward, backward = Wire(ranks), Wire(ranks)
    with forward:
        logits = call(ids)
    with backward:
        logits.sum().backward()
    return forward, backward


def ours(family: str, ranks: int, **options: Any) -> tuple[Wire, Wire]:
    """tpcompile, with options of ``parallelize``."""
    model = AutoModelForCausalLM.from_config(config_of(family)).eval()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
    tpcompile.parallelize(model, mesh, example_kwargs={"input_ids": ids}, **options)
    return step(lambda x: model(input_ids=x).logits, ranks)


def divided(family: str, ranks: int) -> tuple[Wire, Wire]:
    """tpcompile with ``sequence_parallel=True``."""
    return ours(family, ranks, sequence_parallel=True)


def again(family: str, ranks: int) -> tuple[Wire, Wire]:
    """The same, what linear layers gather is gathered again in backward."""
    return ours(family, ranks, sequence_parallel=True, checkpointing="gathered")


def theirs(family: str, ranks: int) -> tuple[Wire, Wire]:
    """transformers' own plan."""
    from transformers.distributed import DistributedConfig

    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config_of(family)).save_pretrained(folder)
        plan = DistributedConfig(tp_size=ranks, tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=plan, dtype=torch.float32)
    model.eval()
    return step(lambda x: model(input_ids=x, use_cache=False).logits, ranks)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--family", action="append")
    options = parser.parse_args()
    os.environ.update(RANK="0", WORLD_SIZE=str(options.ranks), LOCAL_RANK="0")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=options.ranks)
    print("| family | variant | forward | sent | backward | sent |\n|---|---|---|---|---|---|")
    for family in options.family or FAMILIES:
        variants = {
            "tpcompile": ours,
            "tpcompile, sequence divided": divided,
            "tpcompile, and gathered again": again,
            "Hugging Face tp_plan": theirs,
        }
        for name, variant in variants.items():
            forward, backward = variant(family, options.ranks)
            print(f"| {family} | {name} | {forward} | {backward} |", flush=True)


if __name__ == "__main__":
    main()

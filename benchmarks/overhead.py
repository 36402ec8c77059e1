"""What runs outside of kernels: microseconds of a call and of a token, beside the unsharded compiled model's.

    python -m benchmarks.overhead [--rounds 15] [--calls 20] [--layers 8] [--tokens 64] [--skip generate]

One rank, a llama so small that nothing but overhead counts. The variants take turns in every round. Prints
the median and the least of the rounds' means, the median of the ratios to the first variant in the same
round, and the ratio of the least, as a markdown table.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

import tpcompile
from tests.helpers.run_ranks import run_spmd

Run = Callable[[], Any]


def model(layers: int, hidden: int) -> LlamaForCausalLM:
    """A llama with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def measure(variants: dict[str, Run], rounds: int, calls: int) -> dict[str, list[float]]:
    """Microseconds of a call, the mean of every round; the variants take turns."""
    found: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        for _ in range(3):
            run()
    for _ in range(rounds):
        for name, run in variants.items():
            began = time.perf_counter()
            for _ in range(calls):
                run()
            found[name].append((time.perf_counter() - began) / calls * 1e6)
    return found


def table(title: str, found: dict[str, list[float]], scale: float = 1.0) -> list[str]:
    """Rows of the result."""
    base = next(iter(found.values()))
    lines = []
    for name, times in found.items():
        ratio = statistics.median(a / b for a, b in zip(times, base, strict=True))
        median, least = statistics.median(times) / scale, min(times) / scale
        lines.append(
            f"| {title} | {name} | {median:.0f} | {least:.0f} | {ratio:.2f} | {min(times) / min(base):.2f} |"
        )
    return lines


def run_rank(rounds: int, calls: int, layers: int, hidden: int, tokens: int, skip: str) -> list[str]:
    """All measurements, on the only rank."""
    torch.set_num_threads(1)
    whole = model(layers, hidden)
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    ids = torch.randint(3, 250, (2, 8))
    call = {"input_ids": ids, "use_cache": False}

    def sharded(**options: Any) -> Any:
        return tpcompile.parallelize(copy.deepcopy(whole), mesh, example_kwargs=call, **options)

    lines = [
        "| | variant | median, us | least, us | ratio | ratio of the least |",
        "|---|---|---|---|---|---|",
    ]
    inductor, own = sharded(compile=True), sharded()
    if "call" not in skip:
        compiled, outer = torch.compile(copy.deepcopy(whole)), torch.compile(own, fullgraph=True)
        variants = {
            "unsharded, torch.compile": lambda: compiled(**call),
            "torch.compile(model, fullgraph=True)": lambda: outer(**call),
            "compile=True": lambda: inductor(**call),
        }
        with torch.no_grad():
            lines += table("a call", measure(variants, rounds, calls))
    if "generate" in skip:
        return lines
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    unsharded = copy.deepcopy(whole)
    unsharded.forward = torch.compile(unsharded.forward)
    static = {**options, "cache_implementation": "static"}
    variants = {
        "unsharded, torch.compile": lambda: unsharded.generate(ids, **static),
        "compile=True": lambda: inductor.generate(ids, **static),
    }
    lines += table("a token, static cache", measure(variants, rounds, 1), tokens)
    variants = {
        "unsharded, eager": lambda: whole.generate(ids, **options),
        "eager": lambda: own.generate(ids, **options),
    }
    lines += table("a token, dynamic cache", measure(variants, rounds, 1), tokens)
    return lines


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("rounds", 15), ("calls", 20), ("layers", 8), ("hidden", 64), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--skip", default="", help='"call" or "generate"')
    args = parser.parse_args()
    for line in run_spmd(run_rank, 1, args=tuple(vars(args).values()), timeout=1800)[0]:
        print(line)


if __name__ == "__main__":
    main()

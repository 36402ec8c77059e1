"""What runs outside of kernels: microseconds of a call and of a token, beside the unsharded compiled model's.

    python -m benchmarks.overhead [--rounds 15] [--calls 20] [--layers 8] [--tokens 64] [--skip generate]

One rank, one thread, a llama so small that nothing but overhead counts. The variants take turns in every
round; the first one comes a second time, which tells the noise. Prints, as a markdown table, of the means of
all rounds the median and the least, on the clock and of the CPU, and the ratios of these to the first
variant's: of the medians, round by round, and of the least.
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


Times = dict[str, list[tuple[float, float]]]
"""Per variant and round, the mean of a call in microseconds: on the clock, and of the CPU."""


def measure(variants: dict[str, Run], rounds: int, calls: int) -> Times:
    """The means of every round; the variants take turns."""
    first = next(iter(variants))
    variants = {**variants, f"{first}, again": variants[first]}
    found: Times = {name: [] for name in variants}
    for run in variants.values():
        for _ in range(3):
            run()
    for _ in range(rounds):
        for name, run in variants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                run()
            ended = time.perf_counter() - wall, time.process_time() - cpu
            found[name].append((ended[0] / calls * 1e6, ended[1] / calls * 1e6))
    return found


def table(title: str, found: Times, scale: float = 1.0) -> list[str]:
    """Rows of the result."""
    lines = []
    for name, times in found.items():
        cells = [title, name]
        for clock in (0, 1):
            own = [each[clock] for each in times]
            base = [each[clock] for each in next(iter(found.values()))]
            cells += [f"{statistics.median(own) / scale:.0f}", f"{min(own) / scale:.0f}"]
            ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
            cells += [f"{ratio:.2f}", f"{min(own) / min(base):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


COLUMNS = ("median, us", "least", "ratio", "of the least")
HEAD = f"| | variant | {' | '.join(f'{clock}: {c}' for clock in ('wall', 'CPU') for c in COLUMNS)} |"


def run_rank(rounds: int, calls: int, layers: int, hidden: int, tokens: int, skip: str) -> list[str]:
    """All measurements, on the only rank."""
    torch.set_num_threads(1)
    whole = model(layers, hidden)
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    ids = torch.randint(3, 250, (2, 8))
    call = {"input_ids": ids, "use_cache": False}

    def sharded(**options: Any) -> Any:
        return tpcompile.parallelize(copy.deepcopy(whole), mesh, example_kwargs=call, **options)

    lines = [HEAD, "|" + "---|" * (2 + 2 * len(COLUMNS))]
    inductor, own = sharded(compile=True), sharded()
    in_cpp = sharded(compile={"cpp_wrapper": True})
    if "call" not in skip:
        compiled, outer = torch.compile(copy.deepcopy(whole)), torch.compile(own, fullgraph=True)
        variants = {
            "unsharded, torch.compile": lambda: compiled(**call),
            "torch.compile(model, fullgraph=True)": lambda: outer(**call),
            "compile=True": lambda: inductor(**call),
            'compile={"cpp_wrapper": True}': lambda: in_cpp(**call),
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
        'compile={"cpp_wrapper": True}': lambda: in_cpp.generate(ids, **static),
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
    for line in run_spmd(run_rank, 1, *vars(args).values(), timeout=1800)[0]:
        print(line)


if __name__ == "__main__":
    main()

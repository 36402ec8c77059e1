"""Where the time of a first call goes: each stage of the prompt and of the step of an 8B-like llama.

    python -m benchmarks.first_call [--layers 32] [--hidden 4096] [--compile]

One process, rank 0 of 8 that do not exist (torch's fake group: collectives send nothing), with its part of
the weights, in bfloat16 without values; nothing is kept on disk. Prints seconds per stage as a markdown
table; what a stage calls of others is left out.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import tpcompile
from benchmarks.gpu_local import fake_group
from tpcompile import compile_program
from tpcompile.capture.export import capture_model
from tpcompile.capture.repeats import capture_repeated
from tpcompile.runtime import add_program, compile_step

RANKS = 8
STAGES: dict[str, list[tuple[Any, str]]] = {
    "layers are compared, whole and cut": [(capture_repeated, "compare_layers")],
    "`torch.export`": [(torch.export, "export")],
    "the rest of a capture": [(capture_model, "_first_capture"), (compile_program.Compiler, "capture_call")],
    "passes before planning": [(compile_program, "canonical")],
    "planned": [(compile_program, "find_decisions"), (compile_program, "follow")],
    "passes after planning, the proof": [(compile_program, "rewrite")],
    "lowered": [(compile_program, "lower_program")],
    "weights are divided": [(add_program, "_divide")],
    "Inductor": [(compile_step, "_compile")],
}
REST = "all else: comparing, inputs, checks, running"


class Stages:
    """Seconds per stage, without those of stages inside of them."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inside = [0.0]

    def timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same call; its time is the stage's."""

        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            self._inside.append(0.0)
            try:
                return call(*args, **kwargs)
            finally:
                taken = time.perf_counter() - began
                self.seconds[stage] += taken - self._inside.pop()
                self._inside[-1] += taken

        return run

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Times what runs inside of the block."""
        with ExitStack() as stack:
            for stage, places in STAGES.items():
                for owner, name in places:
                    timed = self.timed(stage, getattr(owner, name))
                    stack.enter_context(mock.patch.object(owner, name, timed))
            yield


def measure(hidden: int, layers: int, compiled: bool) -> dict[str, dict[str, float]]:
    """Seconds per stage for making the model's first program, the prompt's and the step's."""
    fake_group(RANKS)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=layers,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids, found = torch.zeros(1, 32, dtype=torch.long), dict[str, dict[str, float]]()

    def step(name: str, call: Callable[[], Any]) -> Any:
        stages = Stages()
        with stages.watching(), torch.no_grad():
            result = stages.timed(REST, call)()
        found[name] = stages.seconds
        return result

    example = {"input_ids": ids, "use_cache": False}
    make = lambda: tpcompile.parallelize(model, mesh, example_kwargs=example, compile=compiled)  # noqa: E731
    sharded = step("`parallelize`", make)
    sharded.to_empty(device="cpu")
    cache = DynamicCache(config=config)

    def run(tokens: torch.Tensor) -> Any:
        return sharded(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)

    step("prompt", lambda: run(ids))
    step("step", lambda: run(ids[:, :1]))
    return found


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--compile", action="store_true", help="compile the programs of prompt and step")
    args = parser.parse_args()
    os.environ["TPCOMPILE_CACHE"] = "0"
    found = measure(args.hidden, args.layers, args.compile)
    print(f"| stage | {' | '.join(found)} |\n|{'---|' * (1 + len(found))}")
    for stage in (*STAGES, REST):
        print(f"| {stage} | {' | '.join(f'{seconds[stage]:.2f}' for seconds in found.values())} |")
    print(f"| all | {' | '.join(f'{sum(seconds.values()):.2f}' for seconds in found.values())} |")


if __name__ == "__main__":
    main()

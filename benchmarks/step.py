"""Times one forward step, tensor-parallel on two processes of one thread: ours against what else there is.

    python -m benchmarks.step [--family llama] [--rounds 15] [--quick]

All variants live in the same processes and take turns, round by round, so that a machine whose speed drifts
slows them alike; what is reported are medians of the ratios to the hand-written module within a round, for
wall time and for CPU time, with the hand-written module measured twice: the second against the first is the
noise. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import AutoConfig, AutoModelForCausalLM

import tpcompile
from benchmarks.megatron import Local

RANKS = 2
SHAPES = {"prefill 1 x 512": (1, 512), "prefill 4 x 512": (4, 512), "decode-like 8 x 1": (8, 1)}
Step = Callable[[Tensor], Any]


def config_of(family: str) -> Any:
    """A model of hidden size 1024 with four layers."""
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 16 if family == "phi3" else 8,
        "vocab_size": 32000,
        "pad_token_id": 0,
    }
    return AutoConfig.for_model(family, **sizes, use_cache=False)


def whole_model(family: str) -> Any:
    """The unsharded model; the same weights on every rank."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family)).eval()


def ours(family: str, mesh: DeviceMesh, folder: str) -> Step:
    """tpcompile, under torch.compile."""
    model = tpcompile.parallelize(
        whole_model(family), mesh, example_kwargs={"input_ids": torch.zeros(2, 16, dtype=torch.long)}
    )
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    return lambda ids: compiled(input_ids=ids).logits


def by_hand(family: str, mesh: DeviceMesh, folder: str) -> Step:
    """The hand-written module, under torch.compile."""
    return torch.compile(Local(whole_model(family), mesh.get_group()), fullgraph=True, dynamic=False)


def hugging_face(family: str, mesh: DeviceMesh, folder: str) -> Step:
    """transformers' own plan, under torch.compile."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, tp_plan="auto", device_mesh=mesh, dtype=torch.float32
    )
    compiled = torch.compile(model.eval(), dynamic=False)
    return lambda ids: compiled(input_ids=ids, use_cache=False).logits


def dtensor(family: str, mesh: DeviceMesh, folder: str) -> Step:
    """torch's parallelize_module with the usual styles, under torch.compile."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = whole_model(family)
    column, row = ColwiseParallel(), RowwiseParallel()
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for i in range(len(model.model.layers)):
        for name in (
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "mlp.gate_proj",
            "mlp.up_proj",
        ):
            plan[f"model.layers.{i}.{name}"] = column
        plan[f"model.layers.{i}.self_attn.o_proj"] = row
        plan[f"model.layers.{i}.mlp.down_proj"] = row
    compiled = torch.compile(parallelize_module(model, mesh, plan), dynamic=False)
    return lambda ids: compiled(input_ids=ids, use_cache=False).logits


def one_process(family: str, mesh: DeviceMesh, folder: str) -> Step:
    """The unsharded model on every rank, under torch.compile."""
    compiled = torch.compile(whole_model(family), dynamic=False)
    return lambda ids: compiled(input_ids=ids, use_cache=False).logits


VARIANTS = {
    "by hand": by_hand,
    "by hand, again": by_hand,
    "tpcompile": ours,
    "Hugging Face tp_plan": hugging_face,
    "parallelize_module": dtensor,
    "one process": one_process,
}
# What the hand-written module and the plain plan are written for.
LLAMA_ONLY = {"by hand", "by hand, again", "parallelize_module"}


def measure(rank: int, port: int, family: str, rounds: int, folder: str, shapes: list[str]) -> None:
    """One rank: builds all variants, then times them in turns; rank 0 prints."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(RANKS))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    names = [n for n in VARIANTS if family == "llama" or n not in LLAMA_ONLY]
    base = names[0]
    report = [
        f"### {family}",
        "",
        "| shape | variant | first call, s | wall, ms | wall ratio | CPU ratio |",
        "|---|---|---|---|---|---|",
    ]
    for shape in shapes:
        ids = torch.randint(0, 32000, SHAPES[shape], generator=torch.Generator().manual_seed(1))
        steps: dict[str, Step] = {}
        first: dict[str, float] = {}
        expected = torch.empty(0)
        with torch.no_grad():
            for name in names:
                torch._dynamo.reset()
                start = time.perf_counter()
                steps[name] = VARIANTS[name](family, mesh, folder)
                result = steps[name](ids)
                first[name] = time.perf_counter() - start
                expected = result if name == base else expected
                worst = float((result - expected).abs().max() / expected.abs().max())
                assert worst < 1e-4, f"{name} is off by {worst}"
            wall, cpu = time_in_turns(steps, ids, rounds)
        for name in names:
            ratio_wall = statistics.median(a / b for a, b in zip(wall[name], wall[base], strict=True))
            ratio_cpu = statistics.median(a / b for a, b in zip(cpu[name], cpu[base], strict=True))
            report.append(
                f"| {shape} | {name} | {first[name]:.1f} | {statistics.median(wall[name]) * 1e3:.1f} "
                f"| {ratio_wall:.3f} | {ratio_cpu:.3f} |"
            )
    if rank == 0:
        print("\n".join(report), flush=True)
    dist.destroy_process_group()


def time_in_turns(
    steps: dict[str, Step], ids: Tensor, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds per step of each variant in each round, wall and CPU (of this rank)."""
    repeats = 20 if ids.numel() < 64 else 2
    wall: dict[str, list[float]] = {n: [] for n in steps}
    cpu: dict[str, list[float]] = {n: [] for n in steps}
    for r in range(rounds + 1):
        order = list(steps) if r % 2 else list(steps)[::-1]
        for name in order:
            dist.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                steps[name](ids)
            if r:  # the first round warms up
                wall[name].append((time.perf_counter() - start) / repeats)
                cpu[name].append((time.process_time() - start_cpu) / repeats)
    return wall, cpu


def main() -> None:
    """Parses the command line and starts the ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", default="llama")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole_model(options.family).save_pretrained(folder)
        port = 29000 + os.getpid() % 1000
        arguments = (port, options.family, options.rounds, folder, options.shape or list(SHAPES))
        mp.spawn(measure, args=arguments, nprocs=RANKS)


if __name__ == "__main__":
    main()

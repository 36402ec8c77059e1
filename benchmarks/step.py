"""Times one forward step, tensor-parallel on two processes of one thread: ours against what else there is.

    python -m benchmarks.step [--family llama] [--shape "decode-like 8 x 1"] [--variant tpcompile]

All variants live in the same processes and take turns, round by round, so that a machine whose speed drifts
slows them alike. What is reported are medians of the ratios to the first variant within a round, with the
quartiles behind them, for wall time (the slower rank's) and for CPU time (the ranks' mean). The first variant
is measured twice: the second against the first is the noise. Every variant is built once, and compiled for
each shape by itself. Prints a markdown table per family.

Hugging Face's variant needs the package accelerate, which transformers wants for ``tp_plan``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
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
VOCABULARY = 32000
Step = Callable[[Tensor], Any]


@dataclass(frozen=True)
class Shape:
    """The size of a call's input, how many rounds are run, and how many calls a round has."""

    size: tuple[int, int]
    rounds: int
    repeats: int


SHAPES = {
    "prefill 1 x 512": Shape((1, 512), 11, 1),
    "prefill 4 x 512": Shape((4, 512), 5, 1),
    "decode-like 8 x 1": Shape((8, 1), 15, 20),
}


def config_of(family: str) -> Any:
    """A model of hidden size 1024 with four layers."""
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 16 if family == "phi3" else 8,
        "vocab_size": VOCABULARY,
        "pad_token_id": 0,
    }
    return AutoConfig.for_model(family, **sizes, use_cache=False)


def whole_model(family: str) -> Any:
    """The unsharded model; the same weights on every rank."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family)).eval()


EXAMPLE = {"input_ids": torch.zeros(2, 512, dtype=torch.long)}


def ours(family: str, mesh: DeviceMesh, folder: str) -> Step:
    """tpcompile, with its programs handed to Inductor."""
    options = {"dynamic": False}
    model = tpcompile.parallelize(whole_model(family), mesh, example_kwargs=EXAMPLE, compile=options)
    return lambda ids: model(input_ids=ids).logits


def around(family: str, mesh: DeviceMesh, folder: str) -> Step:
    """tpcompile, under torch.compile."""
    model: Any = tpcompile.parallelize(whole_model(family), mesh, example_kwargs=EXAMPLE)
    with torch.no_grad():  # dynamo does not capture: a single row has a program of its own
        for shape in SHAPES.values():
            model.capture(input_ids=torch.zeros(shape.size, dtype=torch.long))
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    return lambda ids: compiled(input_ids=ids).logits


def by_hand(family: str, mesh: DeviceMesh, folder: str) -> Step:
    """The hand-written module, under torch.compile."""
    return torch.compile(Local(whole_model(family), mesh.get_group()), fullgraph=True, dynamic=False)


def hugging_face(family: str, mesh: DeviceMesh, folder: str) -> Step:
    """transformers' own plan, under torch.compile."""
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=RANKS, tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float32)
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


VARIANTS: dict[str, Callable[[str, DeviceMesh, str], Step]] = {
    "by hand": by_hand,
    "tpcompile": ours,
    "tpcompile, torch.compile": around,
    "Hugging Face tp_plan": hugging_face,
    "parallelize_module": dtensor,
    "one process": one_process,
}
# What the hand-written module and the plain plan are written for.
LLAMA_ONLY = {"by hand", "parallelize_module"}
AGAIN = ", again"


@dataclass(frozen=True)
class Wanted:
    """What is measured.

    Attributes:
        family: a model type of transformers.
        shapes: names of ``SHAPES``.
        variants: names of ``VARIANTS``; the first one is what others are held against.
        rounds: how many rounds, as a multiple of the usual number.
        folder: a checkpoint of the model.
    """

    family: str
    shapes: tuple[str, ...]
    variants: tuple[str, ...]
    rounds: float
    folder: str


@dataclass
class Times:
    """Seconds per step, by round: of the slower rank by the clock, of all ranks' mean in CPU time."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def join(rank: int, port: int, ranks: int) -> DeviceMesh:
    """Connects a process that was started as a rank, with one thread."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    # Variants of one class share dynamo's cache of compiled code, and each shape is an entry.
    torch._dynamo.config.recompile_limit = 64
    return init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))


def measure(rank: int, port: int, wanted: Wanted) -> None:
    """One rank: builds all variants, then times them in turns; rank 0 prints."""
    mesh = join(rank, port, RANKS)
    torch.compile(lambda x: x + 1)(torch.ones(3))  # what only the first compilation of a process pays
    names = [*wanted.variants, wanted.variants[0] + AGAIN]
    steps: dict[str, Step] = {}
    built: dict[str, float] = {}
    rows = [
        "| shape | variant | first call, s | wall, ms | wall ratio | CPU ratio |",
        "|---|---|---|---|---|---|",
    ]
    with torch.no_grad():
        for name in names:
            start = time.perf_counter()
            steps[name] = VARIANTS[name.removesuffix(AGAIN)](wanted.family, mesh, wanted.folder)
            built[name] = time.perf_counter() - start
        for shape in wanted.shapes:
            ids = torch.randint(0, VOCABULARY, SHAPES[shape].size, generator=torch.Generator().manual_seed(1))
            first = first_calls(steps, ids)
            if shape == wanted.shapes[0]:
                first = {name: seconds + built[name] for name, seconds in first.items()}
            times = time_in_turns(
                steps, ids, max(2, round(SHAPES[shape].rounds * wanted.rounds)), SHAPES[shape].repeats
            )
            rows += [row(shape, name, first[name], times[name], times[names[0]]) for name in names]
            if rank == 0:
                print(f"{wanted.family}, {shape}: done", file=sys.stderr, flush=True)
    if rank == 0:
        print("\n".join([f"### {wanted.family}", "", *rows, ""]), flush=True)
    dist.destroy_process_group()


def first_calls(steps: dict[str, Step], ids: Tensor) -> dict[str, float]:
    """Seconds of each variant's first call with a shape, and a check that all give the same."""
    seconds: dict[str, float] = {}
    expected: Tensor | None = None
    for name, step in steps.items():
        dist.barrier()
        start = time.perf_counter()
        result = step(ids)
        seconds[name] = time.perf_counter() - start
        expected = result if expected is None else expected
        worst = float((result - expected).abs().max() / expected.abs().max())
        assert worst < 1e-4, f"{name} is off by {worst}"
    return seconds


def time_in_turns(steps: dict[str, Step], ids: Tensor, rounds: int, repeats: int) -> dict[str, Times]:
    """Times of each variant in each round, the same on all ranks; the order is turned round each time."""
    times = {name: Times() for name in steps}
    for r in range(rounds + 1):
        for name in list(steps) if r % 2 else list(steps)[::-1]:
            dist.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                steps[name](ids)
            spent = (time.perf_counter() - start, time.process_time() - start_cpu)
            every: list[Any] = [None] * RANKS
            dist.all_gather_object(every, spent)
            if r:  # the first round warms up
                times[name].wall.append(max(wall for wall, _ in every) / repeats)
                times[name].cpu.append(statistics.mean(cpu for _, cpu in every) / repeats)
    return times


def row(shape: str, name: str, first: float, mine: Times, base: Times) -> str:
    """One line of the table."""
    wall, cpu = ratios(mine.wall, base.wall), ratios(mine.cpu, base.cpu)
    return f"| {shape} | {name} | {first:.1f} | {statistics.median(mine.wall) * 1e3:.1f} | {wall} | {cpu} |"


def ratios(mine: list[float], base: list[float]) -> str:
    """The median of the ratios within a round, and their quartiles."""
    found = [a / b for a, b in zip(mine, base, strict=True)]
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.2f} to {high:.2f})"


def variants_of(family: str, chosen: list[str] | None) -> tuple[str, ...]:
    """What can be measured for a family, of what was chosen; what is left out is said."""
    names = [n for n in chosen or VARIANTS if family == "llama" or n not in LLAMA_ONLY]
    if family != "llama":  # held against what there is
        names.sort(key=lambda n: n != "Hugging Face tp_plan")
    if "Hugging Face tp_plan" in names and find_spec("accelerate") is None:
        print("Hugging Face tp_plan is left out: pip install accelerate", file=sys.stderr)
        names.remove("Hugging Face tp_plan")
    return tuple(names)


def main() -> None:
    """Parses the command line and starts the ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", action="append", help="a model type, several times if you like (llama)")
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="all of them")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="all of them")
    parser.add_argument("--rounds", type=float, default=1.0, help="a multiple of the usual number of rounds")
    options = parser.parse_args()
    for i, family in enumerate(options.family or ["llama"]):
        with tempfile.TemporaryDirectory() as folder:
            # Everybody starts cold: no kernels, graphs or plans from an earlier run.
            os.environ.update(TORCHINDUCTOR_CACHE_DIR=f"{folder}/inductor", TPCOMPILE_CACHE="0")
            whole_model(family).save_pretrained(f"{folder}/model")
            shapes = tuple(options.shape or SHAPES)
            wanted = Wanted(
                family, shapes, variants_of(family, options.variant), options.rounds, f"{folder}/model"
            )
            mp.spawn(measure, args=(29000 + os.getpid() % 1000 + i, wanted), nprocs=RANKS)


if __name__ == "__main__":
    main()

"""Times a training step on two processes of one thread, and counts its memory: ours against the others.

    python -m benchmarks.train_step [--small] [--mode eager] [--variant tpcompile] [--rounds 9]

Forward, loss, backward and AdamW of a llama in float32, hidden size 1024, four layers, 2 x 512 tokens, a
vocabulary of 32000 (``--small``: 256, two layers, 2 x 128, 4096). All variants live in the same processes and
take turns, round by round; the order turns round each time. Times, by the clock and of the CPU, are the
slower rank's, as medians of the ratios to the first variant within a round, with the quartiles. The first
variant is there twice: the second against the first is the noise. Every variant trains its own copy of the
same weights on the same batch, and all must have the same loss after the last step.

Memory is counted, not sampled, in a step of its own at the end: what torch's allocator was asked for since
the step began, at most at once, beside the weights and the optimizer's states, which are there before. Both
are the larger rank's.

"sequence" variants divide positions between the blocks. Hugging Face's plan needs the package accelerate. All
variants of the usual size take 15 GiB together; ``--variant``, several times if you like, takes fewer.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import tpcompile
from benchmarks.megatron import Trained, llama
from benchmarks.step import AGAIN, Times, join, ratios

RANKS = 2
USUAL, SMALL = (1024, 4, 32000, (2, 512)), (256, 2, 4096, (2, 128))
"""Width, layers, vocabulary, and batch."""


@dataclass(frozen=True)
class Wanted:
    """What is measured: a model, a batch, rounds, modes ("eager", "compiled"), variants, and a checkpoint."""

    width: int
    layers: int
    vocabulary: int
    batch: tuple[int, int]
    rounds: int
    modes: tuple[str, ...]
    variants: tuple[str, ...]
    folder: str


@dataclass(frozen=True)
class Model:
    """One way to train: its parameters, the loss of a batch, and what follows backward."""

    parameters: Iterable[nn.Parameter]
    loss: Callable[[Tensor], Tensor]
    finish: Callable[[], None] = lambda: None
    around_backward: Any = None


def whole_model(wanted: Wanted) -> LlamaForCausalLM:
    """The unsharded model; the same weights on every rank."""
    torch.manual_seed(0)
    return llama(wanted.width, wanted.layers, wanted.width // 128, wanted.vocabulary)


def ours(wanted: Wanted, mesh: DeviceMesh, compiled: bool, sequence: bool) -> Model:
    """tpcompile; compiled by Inductor without dynamo."""
    ids = torch.zeros(wanted.batch, dtype=torch.long)
    model = tpcompile.parallelize(
        whole_model(wanted),
        mesh,
        example_kwargs={"input_ids": ids, "labels": ids},
        sequence_parallel=sequence,
        compile={"dynamic": False} if compiled else False,
    )
    return Model(list(model.parameters()), lambda x: model(input_ids=x, labels=x).loss)


def by_hand(wanted: Wanted, mesh: DeviceMesh, compiled: bool, sequence: bool) -> Model:
    """The hand-written module."""
    model = Trained(whole_model(wanted), mesh.get_group(), sequence)
    loss = torch.compile(model.loss, fullgraph=True, dynamic=False) if compiled else model.loss
    return Model(list(model.parameters()), loss, model.finish)


def hugging_face(wanted: Wanted, mesh: DeviceMesh, compiled: bool, sequence: bool) -> Model:
    """transformers' own plan."""
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(tp_size=RANKS, tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(
        wanted.folder, distributed_config=config, dtype=torch.float32
    )
    model.train()
    called = torch.compile(model, dynamic=False) if compiled else model
    return Model(list(model.parameters()), lambda x: called(input_ids=x, labels=x, use_cache=False).loss)


def dtensor(wanted: Wanted, mesh: DeviceMesh, compiled: bool, sequence: bool) -> Model:
    """torch's parallelize_module with the usual styles; the loss stays sharded by torch's loss_parallel."""
    model = whole_model(wanted)
    between = Shard(1) if sequence else Replicate()
    column, row = ColwiseParallel(), RowwiseParallel(output_layouts=between)
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "lm_head": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }
    inside: dict[str, Any] = {
        "self_attn.q_proj": column,
        "self_attn.k_proj": column,
        "self_attn.v_proj": column,
    }
    inside |= {"mlp.gate_proj": column, "mlp.up_proj": column, "mlp.down_proj": row, "self_attn.o_proj": row}
    if sequence:
        given: dict[str, Any] = {"hidden_states": between}
        gathered: dict[str, Any] = {"hidden_states": Replicate()}
        inside |= {"input_layernorm": SequenceParallel(), "post_attention_layernorm": SequenceParallel()}
        inside["self_attn"] = PrepareModuleInput(
            input_kwarg_layouts=given, desired_input_kwarg_layouts=gathered
        )
        inside["mlp"] = PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),))
        plan["model.norm"] = SequenceParallel()
    plan |= {
        f"model.layers.{i}.{name}": style for i in range(wanted.layers) for name, style in inside.items()
    }
    model = parallelize_module(model, mesh, plan)
    places = torch.arange(wanted.batch[1]).unsqueeze(0)

    def only_loss(x: Tensor) -> Tensor:  # compiled code with two results wants gradients of both
        return model(input_ids=x, position_ids=places, labels=x, use_cache=False).loss

    called = torch.compile(only_loss, dynamic=False) if compiled else only_loss

    def loss(x: Tensor) -> Tensor:
        with loss_parallel():
            return called(x)

    return Model(list(model.parameters()), loss, around_backward=loss_parallel)


VARIANTS: dict[str, Callable[[Wanted, DeviceMesh, bool, bool], Model]] = {
    "by hand": by_hand,
    "tpcompile": ours,
    "Hugging Face tp_plan": hugging_face,
    "parallelize_module": dtensor,
    "by hand, sequence": by_hand,
    "tpcompile, sequence": ours,
    "parallelize_module, sequence": dtensor,
}


class Training:
    """A variant with its optimizer."""

    def __init__(self, model: Model) -> None:
        self.model = model
        kinds: dict[bool, list[nn.Parameter]] = {}
        for p in model.parameters:
            kinds.setdefault(isinstance(p, DTensor), []).append(p)
        # foreach can't mix plain tensors with DTensors, which other plans have side by side.
        groups = [{"params": params} for params in kinds.values()]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, foreach=True)

    def step(self, ids: Tensor) -> float:
        """One step, and its loss."""
        loss = self.model.loss(ids)
        if self.model.around_backward is None:
            loss.backward()
        else:
            with self.model.around_backward():
                loss.backward()
        self.model.finish()
        self.optimizer.step()
        self.optimizer.zero_grad()
        loss = loss.detach()
        return float(loss.full_tensor() if isinstance(loss, DTensor) else loss)

    def held(self) -> int:
        """Bytes of this rank's weights and of the optimizer's states."""
        states = [x for state in self.optimizer.state.values() for x in state.values()]
        local = [x.to_local() if isinstance(x, DTensor) else x for x in (*self.model.parameters, *states)]
        return sum(x.numel() * x.element_size() for x in local if isinstance(x, Tensor))

    def most(self, ids: Tensor) -> int:
        """Bytes that a step has at most, beside those."""
        gc.collect()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            self.step(ids)
        events = seen.profiler.kineto_results.events()
        now = most = 0
        for event in events:
            if event.name() == "[memory]":
                now += event.nbytes()
                most = max(most, now)
        return most


def measure(rank: int, port: int, wanted: Wanted) -> None:
    """One rank: builds all variants, then times them in turns; rank 0 prints."""
    mesh = join(rank, port, RANKS)
    ids = torch.randint(0, wanted.vocabulary, wanted.batch, generator=torch.Generator().manual_seed(1))
    for mode in wanted.modes:
        trainings = build(wanted, mesh, mode)
        times, losses = time_in_turns(trainings, ids, wanted.rounds)
        worst = max(losses.values()) - min(losses.values())
        assert worst < 1e-3 * min(losses.values()), losses
        held = {name: largest(training.held()) for name, training in trainings.items()}
        most = {name: largest(training.most(ids)) for name, training in trainings.items()}
        if rank == 0:
            print(table(mode, times, held, most), flush=True)
    dist.destroy_process_group()


def build(wanted: Wanted, mesh: DeviceMesh, mode: str) -> dict[str, Training]:
    """All variants, and the first one again."""
    names = [*wanted.variants, wanted.variants[0] + AGAIN]
    found: dict[str, Training] = {}
    for name in names:
        make = VARIANTS[name.removesuffix(AGAIN)]
        found[name] = Training(make(wanted, mesh, mode == "compiled", ", sequence" in name))
        if dist.get_rank() == 0:
            print(f"{mode}, {name}: built", file=sys.stderr, flush=True)
    return found


def time_in_turns(
    trainings: dict[str, Training], ids: Tensor, rounds: int
) -> tuple[dict[str, Times], dict[str, float]]:
    """Times of each variant in each round, the same on all ranks, and the last losses."""
    times = {name: Times() for name in trainings}
    losses: dict[str, float] = {}
    for r in range(rounds + 2):
        for name in list(trainings) if r % 2 else list(trainings)[::-1]:
            dist.barrier()
            start, start_cpu = time.perf_counter(), time.process_time()
            losses[name] = trainings[name].step(ids)
            wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
            if r > 1:  # the first compiles, and makes the optimizer's states; the second warms up
                times[name].wall.append(largest(wall))
                times[name].cpu.append(largest(cpu))
    return times, losses


def largest(mine: float) -> Any:
    """The largest of the ranks' numbers."""
    every: list[Any] = [None] * RANKS
    dist.all_gather_object(every, mine)
    return max(every)


def table(mode: str, times: dict[str, Times], held: dict[str, int], most: dict[str, int]) -> str:
    """Markdown; everything is held against the first variant."""
    lines = [
        f"### {mode}",
        "",
        "| variant | wall, ms | wall ratio | CPU ratio | held, MiB | a step adds, MiB | memory ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    first = next(iter(times))
    for name, mine in times.items():
        memory = (held[name] + most[name]) / (held[first] + most[first])
        lines.append(
            f"| {name} | {statistics.median(mine.wall) * 1e3:.0f} | {ratios(mine.wall, times[first].wall)} "
            f"| {ratios(mine.cpu, times[first].cpu)} | {held[name] / 2**20:.1f} | {most[name] / 2**20:.1f} "
            f"| {memory:.3f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    """Parses the command line and starts the ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a model that takes seconds")
    parser.add_argument("--mode", action="append", choices=("eager", "compiled"), help="both")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="all of them")
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    names = list(asked.variant or VARIANTS)
    if "Hugging Face tp_plan" in names and find_spec("accelerate") is None:
        print("Hugging Face tp_plan is left out: pip install accelerate", file=sys.stderr)
        names.remove("Hugging Face tp_plan")
    width, layers, vocabulary, batch = SMALL if asked.small else USUAL
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(TORCHINDUCTOR_CACHE_DIR=f"{folder}/inductor", TPCOMPILE_CACHE="0")
        modes = tuple(asked.mode or ("eager", "compiled"))
        wanted = Wanted(
            width, layers, vocabulary, batch, asked.rounds, modes, tuple(names), f"{folder}/model"
        )
        whole_model(wanted).save_pretrained(wanted.folder)
        mp.spawn(measure, args=(29000 + os.getpid() % 1000, wanted), nprocs=RANKS)


if __name__ == "__main__":
    main()

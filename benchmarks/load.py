"""Loads a checkpoint of about one gigabyte over two processes: tpcompile beside transformers' own tp_plan.

    python -m benchmarks.load [--rounds 3] [--layers 16]

Every load has fresh processes of one thread, which take turns; before each the file is dropped from the
page cache. Prints a markdown table of medians over rounds, of the slower rank: seconds (wall and CPU) to
read the weights and use each once (transformers leaves slices mapped in the file where it can, to be read
when they are used), and for all of ``from_pretrained`` (ours captures and plans as well); by how much the
anonymous memory of a process grew at most while it read; and how much it holds afterwards.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch.distributed.device_mesh import init_device_mesh

import tpcompile

RANKS = 2
MIB = 2**20
Result = dict[str, float]


def anonymous() -> int:
    """This process' anonymous memory, in bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Watch:
    """Times a block and samples its anonymous memory."""

    def __enter__(self) -> Watch:
        self.before = self.peak = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, anonymous())

    def __exit__(self, *error: object) -> None:
        self.wall = time.perf_counter() - self._wall
        self.cpu = time.process_time() - self._cpu
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, anonymous())

    def result(self, prefix: str) -> Result:
        """Seconds, and bytes by which memory grew."""
        grown = self.peak - self.before
        return {f"{prefix} wall": self.wall, f"{prefix} cpu": self.cpu, f"{prefix} peak": grown}


def watched(where: Any, name: str, found: list[Result]) -> None:
    """Has a function watched whenever it is called."""
    inner = getattr(where, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        with Watch() as watch:
            result = inner(*args, **kwargs)
        found.append(watch.result("read"))
        return result

    setattr(where, name, run)


def ours(folder: str) -> tuple[Any, list[Result]]:
    """tpcompile; what it reads with is watched."""
    from tpcompile.weights.loading import load_slices

    found: list[Result] = []
    watched(load_slices, "load_slices", found)
    return tpcompile.from_pretrained(folder, init_device_mesh("cpu", (RANKS,))), found


def theirs(folder: str) -> tuple[Any, list[Result]]:
    """transformers; likewise."""
    found: list[Result] = []
    watched(transformers.PreTrainedModel, "_load_pretrained_model", found)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto"), found


VARIANTS: dict[str, Callable[[str], tuple[Any, list[Result]]]] = {
    "tpcompile": ours,
    "transformers, tp_plan=auto": theirs,
}


def run(rank: int, port: int, variant: str, folder: str, out: str) -> None:
    """One load on one rank; the result goes to a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TPCOMPILE_CACHE": "0"}
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    if rank == 0:
        drop_from_cache(folder)
    dist.barrier()
    with Watch() as watch:
        model, reads = VARIANTS[variant](folder)
    with Watch() as use:
        for parameter in model.parameters():
            _local(parameter).sum()
    held = sum(_local(p).nbytes for p in model.parameters())
    torch.save(watch.result("all") | reads[-1] | use.result("use") | {"held": held}, f"{out}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


def _local(parameter: Any) -> torch.Tensor:
    local: torch.Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local


def drop_from_cache(folder: str) -> None:
    """Has the files read from the disk next time."""
    for path in Path(folder).glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def load(variant: str, folder: str) -> Result:
    """One load over all ranks; the worse of each number."""
    with tempfile.TemporaryDirectory() as out:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        mp.spawn(run, args=(store.port, variant, folder, out), nprocs=RANKS)
        results = [torch.load(f"{out}/{rank}") for rank in range(RANKS)]
    return {key: max(result[key] for result in results) for key in results[0]}


def make_checkpoint(folder: str, layers: int) -> int:
    """A Llama with random weights in float32, on disk; its bytes."""
    config = transformers.LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=32000,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = make_checkpoint(folder, options.layers)
        rounds = [{v: load(v, folder) for v in VARIANTS} for _ in range(options.rounds)]
    print(f"\n{size / MIB:.0f} MiB of safetensors, {RANKS} ranks, {options.rounds} rounds\n")
    print("| | read and used, wall s | CPU s | read, CPU s | all, CPU s | anonymous MiB | held MiB |")
    print("|---|---|---|---|---|---|---|")
    for variant in VARIANTS:
        median = {k: statistics.median(r[variant][k] for r in rounds) for k in rounds[0][variant]}
        wall, cpu = (median[f"read {k}"] + median[f"use {k}"] for k in ("wall", "cpu"))
        times = " | ".join(f"{t:.2f}" for t in (wall, cpu, median["read cpu"], median["all cpu"]))
        peak, held = median["read peak"] / MIB, median["held"] / MIB
        print(f"| {variant} | {times} | {peak:.0f} | {held:.0f} |")


if __name__ == "__main__":
    main()

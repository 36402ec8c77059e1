"""From the start of the processes to the first token and the tenth: tpcompile beside transformers' own plan.

    python -m benchmarks.journey [--hidden 768] [--layers 12] [--rounds 3] [--skip compiled]

Two processes of one thread load a checkpoint from disk and generate twenty tokens behind a prompt of 32,
each variant in fresh processes, in turns. *Cold* has nothing on disk that was compiled or planned before;
*warm* is the start after that, for a saved program one that loads what the cold one has saved in the end;
*for generate* is captured for a prompt while it is loaded. Prints a markdown table of medians, of the slower
rank: seconds since the processes were started to when everything was imported, the model was loaded, and the
first and the tenth token were there; and a token after those, in milliseconds. Ratios are to transformers'
eager warm start of the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RANKS, PROMPT, TOKENS = 2, 32, 10
SAVED = "tpcompile, saved program"
ASKED = "tpcompile, for generate"
VARIANTS = ("transformers", "tpcompile", ASKED, SAVED, "transformers, compiled", "tpcompile, compiled")
STEPS = ("imported", "loaded", "first token", "tenth token", "a token more, ms")
Times = dict[str, float]


def write_checkpoint(folder: Path, hidden: int, layers: int) -> int:
    """A llama with random weights; how many parameters it has."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return int(model.num_parameters())


def rank_main(variant: str, folder: str, began: float) -> None:
    """What a process does: it prints when it was where."""
    times: Times = {}

    def reached(step: str) -> None:
        times[step] = time.time() - began

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh, dtype = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",)), torch.float32
    compiled = variant.endswith("compiled")
    if variant.startswith("tpcompile"):
        import tpcompile

        reached("imported")
        saved = Path(os.environ["TPCOMPILE_CACHE_DIR"], "program")
        model: Any
        if variant == SAVED and saved.exists():
            model = tpcompile.load_program(saved, mesh)
        else:
            call: Any = "generate" if variant == ASKED else None
            model = tpcompile.from_pretrained(
                folder, mesh, dtype=dtype, compile=compiled, example_kwargs=call
            )
    else:
        reached("imported")
        shared = DistributedConfig(tp_size=RANKS, tp_plan="auto")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, distributed_config=shared)
        if compiled:
            model.forward = torch.compile(model.forward)
    reached("loaded")
    words = torch.arange(1, 1 + PROMPT)[None]
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    if compiled:
        options |= {"cache_implementation": "static"}

    class Watch:
        """A streamer that looks at the clock."""

        def __init__(self) -> None:
            self.at: list[float] = []

        def put(self, value: Any) -> None:
            self.at.append(time.time())

        def end(self) -> None:
            pass

    watch = Watch()
    model.generate(words, max_new_tokens=2 * TOKENS, streamer=watch, **options)
    first, tenth, last = watch.at[1], watch.at[TOKENS], watch.at[-1]  # the first put is the prompt
    times |= {"first token": first - began, "tenth token": tenth - began}
    times["a token more, ms"] = 1e3 * (last - tenth) / TOKENS
    dist.barrier()
    if variant == SAVED and not saved.exists():
        model.save_program(saved)
    print(json.dumps(times))
    dist.destroy_process_group()


def run(variant: str, folder: Path, kept: Path) -> Times:
    """One start, of the slower rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began, processes = time.time(), []
    for rank in range(RANKS):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor"),
            "TPCOMPILE_CACHE_DIR": str(kept / "plans"),
        }
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages are compiled
        command = [sys.executable, "-m", "benchmarks.journey", "--variant", variant, "--folder", str(folder)]
        command += ["--began", repr(began)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    found = []
    for process in processes:
        out, _ = process.communicate(timeout=1200)
        if process.returncode:
            raise SystemExit(f"{variant} failed")
        found.append(json.loads(out.strip().splitlines()[-1]))
    return {step: max(each[step] for each in found) for step in STEPS}


def measure(args: argparse.Namespace) -> list[str]:
    """All variants, cold and warm, in turns."""
    found: dict[tuple[str, str], list[Times]] = {}
    variants = [v for v in VARIANTS if not (args.skip and v.endswith(args.skip))]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "model")
        count = write_checkpoint(folder, args.hidden, args.layers)
        for number in range(args.rounds):
            for variant in variants:
                kept = Path(place, f"kept-{number}-{VARIANTS.index(variant)}")  # a name that compilers take
                kept.mkdir()
                for state in ("cold", "warm"):
                    found.setdefault((variant, state), []).append(run(variant, folder, kept))
    lines = [f"{count / 1e6:.0f} M parameters, {RANKS} ranks, {args.rounds} rounds", ""]
    lines += [
        f"| variant | start | {' | '.join(STEPS)} | ratio to the first token |",
        "|" + "---|" * (len(STEPS) + 3),
    ]
    base = found[VARIANTS[0], "warm"]
    for (variant, state), times in found.items():
        cells = [f"{statistics.median(each[step] for each in times):.1f}" for step in STEPS]
        pairs = zip(times, base, strict=True)
        ratio = statistics.median(a["first token"] / b["first token"] for a, b in pairs)
        lines.append(f"| {variant} | {state} | {' | '.join(cells)} | {ratio:.2f} |")
    return lines


def main() -> None:
    """Runs the benchmark, or one of its processes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("hidden", 768), ("layers", 12), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--skip", default="", help='"compiled"')
    for name in ("variant", "folder", "began"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        rank_main(args.variant, args.folder, float(args.began))
        return
    for line in measure(args):
        print(line)


if __name__ == "__main__":
    main()

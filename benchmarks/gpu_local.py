"""One rank's compiled work in a divided Llama, on one card: ours against the hand-written module.

    python -m benchmarks.gpu_local [--ranks 8] [--layers 4] [--rounds 30] [--device cuda]

The model has the widths of Llama 3 8B and few layers. Its process group is torch's fake one: this process is
rank 0, other ranks do not exist, an all-reduce leaves what it is given and an all-gather repeats it. What is
timed is therefore all that a rank does by itself. Both modules take turns, round by round; the hand-written
one is measured twice, and the second against the first is the noise. Prints a markdown table: the time of a
step, its ratio to the hand-written module's, and, on a card, the kernels of a step and how long they take
by themselves. All of it once as torch.compile does by default, and once with CUDA graphs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, LlamaConfig

import tpcompile
from benchmarks.megatron import Local

LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
COLUMNS = ("torch.compile", "shape", "variant", "ms", "ratio", "kernels", "ms on the card")
MODES = {"by default": None, "CUDA graphs": "reduce-overhead"}
SHAPES = {"prefill 1 x 2048": (1, 2048), "prefill 4 x 512": (4, 512), "decode-like 16 x 1": (16, 1)}
Step = Callable[[Tensor], Tensor]


def exact_float32() -> None:
    """Keeps matmuls, convolutions and attention in float32 proper, in whatever shapes they come."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for other_than_math in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{other_than_math}_sdp")(False)


def fake_group(ranks: int) -> None:
    """Makes this process rank 0 of ranks that do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)


def both(
    device: str, ranks: int, sizes: dict[str, int], layers: int, dtype: torch.dtype
) -> tuple[nn.Module, nn.Module]:
    """The hand-written module and our sharded model, as rank 0 has them.

    Args:
        device: the type of device; a fake group must have been made.
        ranks: how many ranks share the model.
        sizes: fields of the configuration.
        layers: the number of decoder blocks.
        dtype: of the weights.
    """
    config = LlamaConfig(**sizes, num_hidden_layers=layers, pad_token_id=0, use_cache=False)
    mesh = init_device_mesh(device, (ranks,), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    with torch.device(device):
        whole = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    by_hand = Local(whole, mesh.get_group())
    ids = torch.zeros(2, 16, dtype=torch.long, device=device)
    # The embedding as the hand-written module has it: fake all-gathers and all-reduces take different times.
    pins = {"model.embed_tokens": tpcompile.Shard(0)}
    return by_hand, tpcompile.parallelize(whole, mesh, example_kwargs={"input_ids": ids}, plan=pins)


def compiled(by_hand: nn.Module, sharded: nn.Module, mode: str | None = None) -> tuple[Step, Step]:
    """Steps of both, compiled for each shape."""
    hand, ours = (torch.compile(m, fullgraph=True, dynamic=False, mode=mode) for m in (by_hand, sharded))
    return hand, lambda ids: ours(input_ids=ids).logits


def tokens(shape: tuple[int, int], sizes: dict[str, int], device: str) -> Tensor:
    """Random tokens, the same every time."""
    ids = torch.randint(0, sizes["vocab_size"], shape, generator=torch.Generator().manual_seed(1))
    return ids.to(device)


def difference(device: str, ranks: int, sizes: dict[str, int], layers: int, shape: tuple[int, int]) -> float:
    """max |ours - by hand| / max |by hand| of rank 0's float32 results, in a process without a group."""
    exact_float32()
    fake_group(ranks)
    by_hand, ours = compiled(*both(device, ranks, sizes, layers, torch.float32))
    ids = tokens(shape, sizes, device)
    with torch.no_grad():
        expected, found = by_hand(ids), ours(ids)
    return float((found - expected).abs().max() / expected.abs().max())


def time_in_turns(steps: dict[str, Step], ids: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds per step of each variant in each round."""
    repeats = 20 if ids.numel() < 64 else 5
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name in list(steps) if number % 2 else list(steps)[::-1]:
            finish(ids.device)
            start = time.perf_counter()
            for _ in range(repeats):
                steps[name](ids)
            finish(ids.device)
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - start) / repeats)
    return seconds


def finish(device: torch.device) -> None:
    """Waits for what runs on the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def on_the_card(step: Step, ids: Tensor, steps: int = 5) -> tuple[float, float]:
    """How many kernels a step runs, and for how many milliseconds they run; 0 on the CPU."""
    if ids.device.type == "cpu":
        return 0, 0.0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step(ids)
        finish(ids.device)
    kernels = [e for e in profile.key_averages() if e.self_device_time_total]
    return (
        sum(e.count for e in kernels) / steps,
        sum(e.self_device_time_total for e in kernels) / steps / 1e3,
    )


def main() -> None:
    """Parses the command line, times each shape and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    fake_group(options.ranks)
    models = both(options.device, options.ranks, LLAMA_8B, options.layers, torch.bfloat16)
    card = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(
        f"rank 0 of {options.ranks}, {options.layers} layers, bfloat16, torch {torch.__version__}, {card}\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for how, mode in MODES.items():
        torch.compiler.reset()
        by_hand, ours = compiled(*models, mode)
        for name, shape in SHAPES.items():
            ids = tokens(shape, LLAMA_8B, options.device)
            _rows(
                f"| {how} | {name}",
                {"by hand": by_hand, "again": by_hand, "tpcompile": ours},
                ids,
                options.rounds,
            )
    dist.destroy_process_group()


@torch.no_grad()
def _rows(start: str, steps: dict[str, Step], ids: Tensor, rounds: int) -> None:
    seconds = time_in_turns(steps, ids, rounds)
    for variant, mine in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(mine, seconds["by hand"], strict=True))
        kernels, busy = on_the_card(steps[variant], ids)
        median = statistics.median(mine) * 1e3
        print(f"{start} | {variant} | {median:.3f} | {ratio:.3f} | {kernels:.0f} | {busy:.3f} |", flush=True)


if __name__ == "__main__":
    main()

"""Times ``tpcompile.fit`` for large models on 1 to 16 devices: no process group, no weights, no GPU.

python -m benchmarks.fit_large [405b] [671b]
"""

from __future__ import annotations

import os
import resource
import sys
import time
from typing import Any

import torch
from transformers import AutoConfig

import tpcompile

SIZES: dict[str, dict[str, Any]] = {
    "405b": {
        "model_type": "llama",
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "671b": {"model_type": "deepseek_v3"},  # whose defaults are those of the model
}


def main() -> None:
    """Fits each size for decoding 8 texts of 4096 tokens; prints a markdown table."""
    os.environ["TPCOMPILE_CACHE"] = "0"  # what was planned before would take no time
    print("| model | seconds | of the CPU | peak GiB | fits on |")
    print("|---|---|---|---|---|")
    for name in sys.argv[1:] or list(SIZES):
        config = AutoConfig.for_model(**SIZES[name], dtype=torch.bfloat16)
        wall, cpu = time.perf_counter(), time.process_time()
        found = tpcompile.fit(config, "80GiB", range(1, 17), mode="decode", batch=8, seq=4096)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        fits = ", ".join(str(size.ranks) for size in found.sizes if size.fits) or "none of these"
        print(f"| {name} | {wall:.0f} | {cpu:.0f} | {peak:.1f} | {fits} |", flush=True)


if __name__ == "__main__":
    main()

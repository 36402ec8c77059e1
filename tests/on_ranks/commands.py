"""What the ranks do in ``test_command_line``: what commands do once their ranks are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tpcompile
from tests.on_ranks.models import mesh
from tpcompile.runtime.run_on_ranks import (
    bench_call,
    convert_checkpoint,
    generate_tokens,
    measure,
    read_prompt,
)


def run(folder: str, out: str) -> dict[str, Any]:
    """Tokens, times of steps, and the checkpoint in other layouts, which a program is loaded from and run."""
    model = tpcompile.from_pretrained(folder, mesh(), dtype=torch.float32)
    given = read_prompt(folder, None, "1,2,3")
    found: dict[str, Any] = {"tokens": generate_tokens(model, *given, 4)["ids"]}
    found["decode"] = measure(model, bench_call(model, "decode", 1, 3), "decode", 2)
    for layout in ("safetensors", "dcp", "program"):
        found[layout] = convert_checkpoint(model, layout, Path(out) / layout, "5GB")["bytes"]
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    program = tpcompile.load_program(str(Path(out) / "program"), mesh())
    with torch.no_grad():
        found["logits"] = [model(input_ids=ids).logits, program(input_ids=ids).logits]
    found["refused"] = []
    for refused in (
        lambda: read_prompt(folder, None, "1,x"),
        lambda: read_prompt(folder, None, None),
        lambda: read_prompt(folder, "a text", None),
        lambda: generate_tokens(model, torch.tensor([[1, 128]]), None, 1),
        lambda: bench_call(model, "train", 1, 3),
    ):
        with pytest.raises(tpcompile.TpCompileError) as error:
            refused()
        found["refused"].append(error.value.what)
    return found

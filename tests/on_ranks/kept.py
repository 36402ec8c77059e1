"""What ranks do in ``test_kept``: models whose weights stay quantised in memory."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

import tpcompile
from tests.helpers import kept
from tests.on_ranks.module_life import refusal
from tests.on_ranks.quantised import LORA, adapted, learn, logits
from tpcompile.weights.sharded_parameter import local_tensor

from .models import mesh

IDS = torch.randint(1, 64, (2, 6), generator=torch.Generator().manual_seed(1))


def load(folder: Path, **wishes: Any) -> Any:
    return tpcompile.from_pretrained(folder, mesh(), keep_quantised=True, **wishes)


def beside_dequantised(name: str, folder: Path) -> tuple[float, bool, float]:
    """How far off logits are, whether tokens are the same, and what a rank holds, of its share."""
    model = load(folder)
    error, same = apart(model, kept.dequantised(name, folder))
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    held = sum(local_tensor(weight).nbytes for weight in model.parameters())
    return error, same, held * dist.get_world_size() / stored


def beside_plain(folder: Path, plain: Path) -> tuple[float, bool]:
    """The same of a checkpoint whose numbers were dequantised by hand."""
    model = load(folder)
    return apart(model, kept.of_experts(kept.FAMILIES["deepseek_v3"][0].from_pretrained(plain)))


def held(folder: Path) -> int:
    """Bytes of a rank."""
    model = load(folder)
    return sum(local_tensor(tensor).nbytes for tensor in (*model.parameters(), *model.buffers()))


def in_memory(name: str, folder: Path) -> tuple[float, bool]:
    """The same of a model that transformers has loaded with its own layers."""
    model = kept.with_fp8_layers(name, folder)
    with pytest.warns(UserWarning, match="those of the dequantised model"):
        model = tpcompile.parallelize(model, mesh())
    said = refusal(lambda: model.save_pretrained(folder / "out"))
    assert "stores this weight in other tensors" in said
    return apart(model, kept.dequantised(name, folder))


def apart(model: Any, whole: Any) -> tuple[float, bool]:
    """How far apart two models' logits are, and whether their tokens are the same."""
    with torch.no_grad():
        error = float((model(IDS).logits - whole(IDS).logits).abs().max())
    prompt = {"input_ids": IDS[:1], "max_new_tokens": 4, "do_sample": False}  # few experts for each
    return error, torch.equal(model.generate(**prompt), whole.generate(**prompt))


def life(folder: Path) -> dict[str, float]:
    """Compiled, saved in every way, and adapted: how far off they are."""
    whole = kept.dequantised("qwen3", folder)
    want, model = logits(whole), load(folder)
    found = {"loaded": logits(model), "copied": logits(copy.deepcopy(model))}
    found["compiled"] = logits(load(folder, compile=True))
    weight = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight.dequantize(), whole.model.layers[0].mlp.up_proj.weight)
    model.save_program(folder / "program")
    with torch.no_grad():
        found["program"] = tpcompile.load_program(folder / "program", mesh())(input_ids=IDS).logits
    assert "a quantised weight would be cast" in refusal(model.bfloat16)
    return {name: float((value - want).abs().max()) for name, value in found.items()}


def adapters(folder: Path) -> list[float]:
    """LoRA over a base that stays quantised: how far off losses and adapters are."""
    losses, weights = learn(adapted(kept.dequantised("qwen3", folder)))
    assert losses[-1] < losses[0]
    loaded = load(folder, adapter=LORA)
    assert {n.split(".")[-2] for n, p in loaded.named_parameters() if p.requires_grad} == {"default"}
    mine, own = learn(adapted(load(folder)))
    assert own.keys() == weights.keys()
    off = [abs(a - b) for a, b in zip(mine, losses, strict=True)]
    return off + [float((own[name] - weights[name]).abs().max().detach()) for name in weights]


def saved(folder: Path) -> None:
    """What is written is what was read: the same tensors under the same names."""
    model = load(folder)
    said = refusal(lambda: model.save_pretrained(folder / "out", save_original_format=False))
    assert "in the form that they were read in" in said
    model.save_pretrained(folder / "out")
    dist.barrier()
    read, written = load_file(folder / "model.safetensors"), load_file(folder / "out" / "model.safetensors")
    assert read.keys() == written.keys()
    for key, tensor in read.items():
        assert tensor.dtype == written[key].dtype and torch.equal(_bytes(tensor), _bytes(written[key])), key
    one, other = (json.loads((at / "config.json").read_text()) for at in (folder, folder / "out"))
    assert one["quantization_config"].items() <= other["quantization_config"].items()
    again = load(folder / "out")
    assert all(p.dtype == q.dtype for p, q in zip(again.parameters(), load(folder).parameters(), strict=True))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)

"""What ranks do in ``test_quantised``: models whose weights are quantised by torchao."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerGroup
from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig

import tpcompile
from tests.helpers.quantised import SIZES
from tests.on_ranks.module_life import refusal

from .models import mesh

IDS = torch.randint(1, 64, (2, 6), generator=torch.Generator().manual_seed(1))
CALL = {"input_ids": IDS, "use_cache": False}
KINDS = {
    "int8": Int8WeightOnlyConfig(),
    "fp8": Float8WeightOnlyConfig(),
    "int4": IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(16)),
    "int8 of activations": Int8DynamicActivationInt8WeightConfig(),
    "int8 and int4": Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(32)
    ),
}


def quantised(kind: str, seed: int = 0) -> Any:
    """A llama."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    quantize_(model, KINDS[kind])
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**CALL).logits
    return found


def kinds() -> dict[str, float]:
    """Per kind how far logits are from the unsharded quantised model's."""
    found = {}
    for kind in KINDS:
        model = quantised(kind)
        want = logits(model)
        model = tpcompile.parallelize(model, mesh(), example_kwargs=CALL, dynamic=False)
        found[kind] = float((logits(model) - want).abs().max())
    return found


LORA = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)


def adapted(model: Any) -> Any:
    torch.manual_seed(3)
    return get_peft_model(model, copy.deepcopy(LORA))


def learn(model: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of some steps, and the adapters afterwards."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, losses = torch.optim.AdamW(weights.values(), lr=1e-2), []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in weights.items()}


def adapters() -> dict[str, float]:
    """LoRA over a quantised base, put in before and after it is divided: how far off it is."""
    losses, weights = learn(adapted(quantised("int8")))
    assert losses[-1] < losses[0]
    return {when: adapters_apart(quantised("int8"), when, losses, weights) for when in ("before", "after")}


def adapters_apart(model: Any, when: str, losses: list[float], weights: dict[str, Tensor]) -> float:
    """How far off losses and adapters are, put in "before" a model is divided, or "after"."""
    if when == "before":
        model = tpcompile.parallelize(adapted(model), mesh())
    else:
        model = adapted(tpcompile.parallelize(model, mesh()))
    mine, own = learn(model)
    assert own.keys() == weights.keys()
    return max(
        *(abs(a - b) for a, b in zip(mine, losses, strict=True)),
        *(float((own[name] - weights[name]).abs().max().detach()) for name in weights),
    )


def life(folder: Path) -> dict[str, float]:
    """Copies, states, whole weights, compiled and saved programs: how far off they are."""
    model = quantised("int4")
    want, weight = logits(model), model.lm_head.weight.dequantize()
    compiled = tpcompile.parallelize(copy.deepcopy(model), mesh(), example_kwargs=CALL, compile=True)
    model = tpcompile.parallelize(model, mesh(), example_kwargs=CALL)
    found = {"compiled": logits(compiled), "sharded": logits(model), "copied": logits(copy.deepcopy(model))}
    assert torch.equal(model.lm_head.weight.dequantize(), weight)
    state = {name: value.clone() for name, value in model.full_state_dict().items()}
    assert state["lm_head._weight_qdata"].dtype == torch.int8
    model.load_state_dict({name: torch.zeros_like(value) for name, value in state.items()})
    assert not logits(model).any()
    model.load_state_dict(state)
    found["loaded"] = logits(model)
    dcp.save({"model": model.sharded_state_dict()}, checkpoint_id=folder / "dcp")
    other = tpcompile.parallelize(quantised("int4", seed=1), mesh(), example_kwargs=CALL)
    assert not torch.equal(logits(other), want)
    dcp.load({"model": other.sharded_state_dict()}, checkpoint_id=folder / "dcp")
    found["restored"] = logits(other)
    model.save_program(folder / "program")
    with torch.no_grad():
        found["program"] = tpcompile.load_program(folder / "program", mesh())(**CALL).logits
    assert "did not quantise this weight" in refusal(lambda: model.save_pretrained(folder / "checkpoint"))
    assert not (folder / "checkpoint").exists()
    return {name: float((value - want).abs().max()) for name, value in found.items()}


def checkpoints(folder: Path) -> dict[str, float]:
    """Quantised while they are loaded, written, and loaded again: how far from what transformers does."""
    kind = TorchAoConfig(KINDS["int4"])
    theirs = LlamaForCausalLM.from_pretrained(folder / "plain", quantization_config=kind)
    ours = tpcompile.from_pretrained(
        folder / "plain", mesh(), example_kwargs=CALL, quantization_config=TorchAoConfig(KINDS["int4"])
    )
    want, found = logits(theirs), {"quantised": logits(ours)}
    whole = ours.full_state_dict()
    for name, weight in theirs.named_parameters():
        if "proj.weight" in name:
            assert torch.equal(whole[name.replace("weight", "_weight_qdata")], weight.qdata)
            assert torch.equal(whole[name.replace("weight", "_weight_scale")], weight.scale)
    ours.save_pretrained(folder / "written")
    dist.barrier()
    found["theirs of ours"] = logits(LlamaForCausalLM.from_pretrained(folder / "written"))
    again = tpcompile.from_pretrained(folder / "written", mesh(), example_kwargs=CALL)
    found["ours again"] = logits(again)
    again.save_pretrained(folder / "rewritten", max_shard_size="40KB")
    dist.barrier()
    other = tpcompile.from_pretrained(folder / "rewritten", mesh(), example_kwargs=CALL)
    assert all(torch.equal(value, whole[name]) for name, value in other.full_state_dict().items())
    adapted = tpcompile.from_pretrained(folder / "written", mesh(), example_kwargs=CALL, adapter=LORA)
    assert {n.split(".")[-2] for n, p in adapted.named_parameters() if p.requires_grad} == {"default"}
    return {name: float((value - want).abs().max()) for name, value in found.items()}


class AsksItsParts(nn.Module):
    """Python that asks for a layer's class, and for the names of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 64)
        self.down = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.up(x)) if type(self.up) is nn.Linear else x
        named = dict(self.down.named_parameters())
        return self.down(x) * 2 if list(named) == ["weight", "bias"] else x


def asked() -> tuple[float, bool, bool]:
    """A quantised model's python sees what it saw before, also where it is verified."""
    torch.manual_seed(0)
    model, x = AsksItsParts().requires_grad_(False), torch.randn(3, 64)
    quantize_(model, KINDS["int8"])
    want = model(x)
    right = tpcompile.verify(model, 2, (x,)).ok
    sharded = tpcompile.parallelize(model, mesh(), (x,))
    model(torch.randn(1, 64))  # another program
    return float((sharded(x) - want).abs().max()), right, sharded.verify((x,)).ok


def refused() -> list[str]:
    """A request that fails leaves a quantised model as it was."""
    model, one = quantised("int4"), quantised("int4").model.layers[0].mlp
    names, kind = list(model.state_dict()), type(one.up_proj.weight)
    twice = tpcompile.parallelize(quantised("int4"), mesh(), example_kwargs=CALL)
    assert "parallelised already" in refusal(lambda: tpcompile.parallelize(twice, mesh()))
    assert torch.equal(logits(twice), logits(copy.deepcopy(twice))), "it is as it was"
    said = [refusal(lambda: tpcompile.parallelize(model, mesh(), plan={"nothing": "colwise"}))]
    layer = model.model.layers[0].mlp.up_proj
    assert list(model.state_dict()) == names
    assert type(layer) is torch.nn.Linear
    assert type(layer.weight) is kind or isinstance(layer.weight, kind)
    assert torch.equal(layer.weight.dequantize(), one.up_proj.weight.dequantize())
    layer.weight.requires_grad_()
    said.append(refusal(lambda: tpcompile.parallelize(model, mesh())))
    layer.weight.requires_grad_(False)
    layer._weight_scale = 1.0
    said.append(refusal(lambda: tpcompile.parallelize(model, mesh())))
    assert list(model.state_dict()) == names
    sharded = tpcompile.parallelize(quantised("fp8"), mesh(), example_kwargs=CALL)
    want, types = logits(sharded), [p.dtype for p in sharded.parameters()]
    said.append(refusal(sharded.bfloat16))
    layer = sharded.model.layers[0].mlp.up_proj
    said.append(refusal(lambda: setattr(layer, "weight", one.up_proj.weight)))
    assert [p.dtype for p in sharded.parameters()] == types
    assert torch.equal(logits(sharded.to("cpu")), want)
    return said

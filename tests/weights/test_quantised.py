"""Quantised weights that are divided as they are: torchao's tensors, in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torchao.quantization import FqnToConfig, quantize_
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TorchAoConfig,
)

import tpcompile
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import quantised as spmd
from tests.weights.test_from_pretrained import opened

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**spmd.SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(head_dim=8, **spmd.SIZES)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**EXPERTS, **spmd.SIZES)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, **spmd.SIZES
        )
    ),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(head_dim=8, **EXPERTS, **spmd.SIZES)),
}


def test_every_kind() -> None:
    """The logits of the unsharded quantised model."""
    for found in run_spmd(spmd.kinds, 2):
        assert found.keys() == spmd.KINDS.keys()
        assert max(found.values()) <= 1e-6, found


@pytest.mark.parametrize(
    "family, ranks, kind",
    [
        ("llama", 2, "int4"),
        ("llama", 4, "int4"),
        ("qwen3", 4, "int4"),
        ("mixtral", 4, "fp8"),
        ("gpt_oss", 4, "fp8"),
    ],
)
def test_families(family: str, ranks: int, kind: str) -> None:
    """Tokens as well; and a rank holds its share."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    quantize_(model, spmd.KINDS[kind])
    report = tpcompile.verify(
        model, ranks, example_kwargs={"input_ids": spmd.IDS}, gradients=False, generate=3
    )
    assert report.ok, report
    whole, plan = tpcompile.plan(model, 1).layout.fullest, tpcompile.plan(model, ranks)
    assert plan.layout.fullest <= 1.05 * whole / ranks, str(plan)
    assert "lm_head.weight" in model.state_dict(), "the model is as it was"


def with_experts(family: str, kind: str) -> Any:
    """A model whose experts torchao has quantised, and computes one after the other, which it can."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    model.set_experts_implementation("eager")
    experts = FqnToConfig({r"re:.*experts\.(gate_up_proj|down_proj)": spmd.KINDS[kind]})
    quantize_(model, experts, filter_fn=None)
    return model


@pytest.mark.parametrize(("family", "kind"), [("mixtral", "int8"), ("mixtral", "fp8"), ("qwen3_moe", "int8")])
def test_experts_in_one_tensor(family: str, kind: str) -> None:
    model = with_experts(family, kind)
    report = tpcompile.verify(model, 2, example_kwargs={"input_ids": spmd.IDS}, gradients=False, generate=3)
    assert report.ok, report
    assert max(one.error for one in report.findings) <= 1e-5, report  # fp8 has a limit of its own
    plan = tpcompile.plan(model, 2)
    assert not plan.layout.params["model.layers.0.mlp.experts._down_proj_qdata"].is_whole, str(plan)
    assert model.config._experts_implementation == "eager"


def test_experts_that_round_activations_are_refused() -> None:
    """torchao's classes have no operation that chooses among them."""
    with pytest.raises(tpcompile.TpCompileError, match="quantise linear layers only"):
        tpcompile.plan(with_experts("mixtral", "int8 of activations"), 2)


def test_rules_are_about_the_weight() -> None:
    """By its own name or by its module's; scales follow the numbers. And transformers' own plan."""
    model = spmd.quantised("int4")
    rules = {"layers.*.self_attn.q_proj.weight": tpcompile.Replicate(), "layers.*.mlp.down_proj": "colwise"}
    layout, layer = tpcompile.plan(model, 2, plan=rules).layout, "model.layers.0."
    assert layout.params[f"{layer}self_attn.q_proj._weight_qdata"].is_whole
    assert layout.local_shape(f"{layer}mlp.down_proj._weight_qdata", 0) == (32, 128)
    assert layout.local_shape(f"{layer}mlp.down_proj._weight_scale", 0) == (32, 8)
    own = tpcompile.plan(model, 2, plan="hf")
    assert own.layout.local_shape(f"{layer}mlp.down_proj._weight_qdata", 0) == (64, 64)
    assert not own.notes


def test_adapters_learn() -> None:
    for found in run_spmd(spmd.adapters, 2):
        assert max(found.values()) <= 1e-5, found


def test_its_life(tmp_path: Path) -> None:
    for found in run_spmd(spmd.life, 2, tmp_path):
        assert max(found.values()) <= 1e-6, found


def test_checkpoints(tmp_path: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**spmd.SIZES)).save_pretrained(tmp_path / "plain")
    for found in run_spmd(spmd.checkpoints, 2, tmp_path):
        assert max(found.values()) <= 1e-6, found


def test_damaged_checkpoints(tmp_path: Path) -> None:
    """Parts that are missing or have other sizes, and methods whose weights cannot be divided."""
    torch.manual_seed(0)
    plain, folder = tmp_path / "plain", tmp_path / "quantised"
    LlamaForCausalLM(LlamaConfig(**spmd.SIZES)).save_pretrained(plain)
    kind = TorchAoConfig(spmd.KINDS["int4"])
    LlamaForCausalLM.from_pretrained(plain, quantization_config=kind).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    name = "model.layers.0.mlp.up_proj._weight_scale"
    for change in ({}, {name: tensors[name][:5]}):
        left = {key: value for key, value in tensors.items() if key != name} | change
        save_file(left, folder / "model.safetensors", metadata)
        with pytest.raises(tpcompile.TpCompileError, match="up_proj"):
            opened(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(tpcompile.TpCompileError):
        opened(folder)
    with pytest.raises(tpcompile.TpCompileError, match="nothing can be quantised like this"):
        opened(plain, quantization_config={"quant_method": "gptq", "bits": 4})


def test_its_python_sees_whole_weights() -> None:
    for error, *right in run_spmd(spmd.asked, 2):
        assert error <= 1e-6
        assert all(right)


def test_what_is_refused() -> None:
    for nothing, trained, taken, cast, replaced in run_spmd(spmd.refused, 2):
        assert "names no module" in nothing
        assert "is to be trained" in trained
        assert "_weight_scale" in taken
        assert "would be cast" in cast
        assert "replaced, added or removed" in replaced

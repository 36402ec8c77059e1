"""Layers that bitsandbytes has quantised, divided as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import tpcompile
from tests.helpers.run_ranks import run_spmd

pytest.importorskip("bitsandbytes", reason="it is in the extra quantised")

from bitsandbytes.nn import Linear4bit, Linear8bitLt

from tests.on_ranks import bitsandbytes_models as spmd
from tests.on_ranks.quantised import IDS
from tests.weights.test_from_pretrained import damaged, opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a llama."""
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("plain")
    LlamaForCausalLM(LlamaConfig(**spmd.SIZES)).save_pretrained(made)
    return made


def test_every_kind(folder: Path) -> None:
    """Logits and tokens of the unsharded quantised model, with the same kernels."""
    for name, kind in spmd.KINDS.items():
        spmd.theirs(folder, **kind).save_pretrained(folder / name)
    for found in run_spmd(spmd.kinds, 2, folder):
        assert len(found) == 2 * len(spmd.KINDS) + 1
        assert max(found.values()) <= 1e-6, found


@pytest.mark.parametrize("kind", spmd.KINDS)
def test_a_rank_holds_its_share(kind: str, tmp_path: Path) -> None:
    """Experts are no linear layers, and stay as they are."""
    torch.manual_seed(0)
    config = MixtralConfig(num_local_experts=4, num_experts_per_tok=2, **spmd.SIZES)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    model = spmd.theirs(tmp_path, MixtralForCausalLM, **spmd.KINDS[kind])
    whole, plan = tpcompile.plan(model, 1).layout.fullest, tpcompile.plan(model, 4)
    assert plan.layout.fullest <= 1.05 * whole / 4, str(plan)
    if kind == "nf4":
        report = tpcompile.verify(model, 4, example_kwargs={"input_ids": IDS}, gradients=False, generate=3)
        assert report.ok, report


def test_adapters_learn(folder: Path) -> None:
    for found in run_spmd(spmd.adapters, 2, folder):
        assert max(found.values()) <= 1e-5, found


def test_rules() -> None:
    """All that the operators' rules allow."""
    torch.manual_seed(0)
    x, bias = torch.randn(3, 5, 6 * 32).double(), torch.randn(14).double()
    for leaves in ((bias,), (None,)):
        packed = torch.randint(0, 256, (14, 6 * 16), dtype=torch.uint8)
        call = (x, packed, torch.rand(14, 6) + 0.5, *leaves, 32, "nf4")
        report = tpcompile.check_rule("tpcompile.linear_4bit", call)
        assert report.ok, report
        numbers = torch.randint(-127, 128, (14, 6 * 32), dtype=torch.int8)
        for threshold in (0.0, 2.0):
            call = (x, numbers, torch.rand(14) + 0.5, *leaves, threshold, False)
            report = tpcompile.check_rule("tpcompile.linear_8bit", call)
            assert report.ok, report


def test_what_fails_gives_it_back(folder: Path) -> None:
    for said in run_spmd(spmd.given_back, 2, folder):
        assert all("names no module" in one for one in said)


def refused(layer: Any) -> str:
    with pytest.raises(tpcompile.TpCompileError) as error:
        tpcompile.plan(torch.nn.Sequential(layer), 2, (torch.randn(4, layer.in_features),))
    return str(error.value)


def test_what_is_refused() -> None:
    assert "rows of 96 numbers are no whole blocks of 64" in refused(Linear4bit(96, 32).to("cpu"))
    assert "not quantised" in refused(Linear4bit(64, 32))
    assert "not quantised" in refused(Linear8bitLt(64, 32, has_fp16_weights=False))
    assert "anew in every call" in refused(Linear8bitLt(64, 32))
    rearranged = Linear4bit(64, 32).to("cpu").eval()
    rearranged.weight.quant_state.packing_format_for_cpu = True
    assert "has rearranged it" in refused(rearranged)


UP = "model.layers.0.mlp.up_proj"
DAMAGED: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], Any], str]] = {
    "no scales": (spmd.NF4, lambda s: s.pop(f"{UP}.weight.absmax"), "are missing"),
    "nothing but bytes": (spmd.NF4, lambda s: [s.pop(k) for k in [*s] if f"{UP}.weight." in k], "has shape"),
    "nothing said": (
        spmd.NF4,
        lambda s: s.pop(f"{UP}.weight.quant_state.bitsandbytes__nf4"),
        "are missing",
    ),
    "fewer scales": (
        spmd.NF4,
        lambda s: s.update({f"{UP}.weight.absmax": s[f"{UP}.weight.absmax"][1:]}),
        r"scales of shape \[511\], where there should be 512",
    ),
    "fewer scales of scales": (
        spmd.NESTED,
        lambda s: s.update({f"{UP}.weight.nested_absmax": s[f"{UP}.weight.nested_absmax"][1:]}),
        r"scales of shape \[1\], where there should be 2",
    ),
    "another matrix": (
        spmd.NF4,
        lambda s: s.update({k.replace("down", "up"): t.clone() for k, t in s.items() if "down" in k}),
        r"shape \[128, 256\] in blocks of 64, where the layer has one of \[256, 128\]",
    ),
    "one scale": (
        spmd.KINDS["int8"],
        lambda s: s.update({f"{UP}.SCB": s[f"{UP}.SCB"][:1]}),
        r"scales of shape \[1\], where there should be 256",
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_checkpoints(kind: str, folder: Path, tmp_path: Path) -> None:
    fields, change, message = DAMAGED[kind]
    spmd.theirs(folder, **fields).save_pretrained(tmp_path / "good")
    bad = damaged(tmp_path / "good", "bad", change)
    with pytest.raises(tpcompile.TpCompileError, match=message):
        opened(Path(bad))

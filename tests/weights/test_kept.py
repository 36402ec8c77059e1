"""fp8 and MXFP4 checkpoints whose weights stay quantised in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from typer.testing import CliRunner

import tpcompile
from tests.helpers import kept, quantised
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import kept as spmd
from tests.weights.test_from_pretrained import damaged, opened
from tpcompile.__main__ import app
from tpcompile.capture.export.capture_model import capture
from tpcompile.ir.calls import bind_call
from tpcompile.weights.loading.expressions import copied, leaves
from tpcompile.weights.saving.quantised_metadata import quantised_metadata

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gpt_oss"])
def test_one_rank(name: str, tmp_path: Path) -> None:
    """Bit by bit what transformers' dequantised model says."""
    kept.checkpoint(name, tmp_path, BF16)
    ((error, tokens, share),) = run_spmd(spmd.beside_dequantised, 1, name, tmp_path)
    assert (error, tokens, share) == (0, True, 1)


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("qwen3", 2), ("llama", 4), ("mixtral", 4), ("deepseek_v3", 2), ("gpt_oss", 2), ("gpt_oss", 4)],
)
def test_ranks(name: str, ranks: int, tmp_path: Path) -> None:
    kept.checkpoint(name, tmp_path, F32, (4, 4) if name == "deepseek_v3" else (16, 16))
    for error, tokens, share in run_spmd(spmd.beside_dequantised, ranks, name, tmp_path):
        assert error <= 1e-5 and tokens and share <= 1.05


@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_in_memory(name: str, tmp_path: Path) -> None:
    """Models with transformers' own fp8 layers, whose kernels are not called."""
    kept.checkpoint(name, tmp_path, F32)
    for error, tokens in run_spmd(spmd.in_memory, 2, name, tmp_path):
        assert error <= 1e-5 and tokens


@pytest.mark.parametrize("name", ["qwen3", "gpt_oss"])
def test_bytes_are_known_before(name: str, tmp_path: Path) -> None:
    """What ``fit`` and the commands say of a checkpoint's weights is what a rank holds."""
    kept.checkpoint(name, tmp_path, BF16)
    bytes_ = run_spmd(spmd.held, 2, tmp_path)[0]
    (size,) = tpcompile.fit(tmp_path, "1GiB", [2], seq=8, keep_quantised=True).sizes
    assert size.estimate is not None and size.estimate.memory.weights == bytes_
    command = ["plan", str(tmp_path), "--ranks", "2", "--keep-quantised", "--mode", "decode", "--json"]
    found = json.loads(CliRunner().invoke(app, command, catch_exceptions=False).stdout)
    assert found["estimate"]["memory"]["weights"] == bytes_
    with pytest.raises(tpcompile.TpCompileError, match="is no checkpoint"):
        tpcompile.fit(transformers.LlamaConfig(), "1GiB", [2], keep_quantised=True)


def test_life(tmp_path: Path) -> None:
    kept.checkpoint("qwen3", tmp_path, F32)
    for found in run_spmd(spmd.life, 2, tmp_path):
        assert max(found.values()) <= 1e-5, found


def test_adapters_learn(tmp_path: Path) -> None:
    kept.checkpoint("qwen3", tmp_path, F32)
    for found in run_spmd(spmd.adapters, 2, tmp_path):
        assert max(found) <= 1e-5, found


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_saved(name: str, tmp_path: Path) -> None:
    kept.checkpoint(name, tmp_path, BF16)
    run_spmd(spmd.saved, 2, tmp_path)


def test_slices_are_copied(tmp_path: Path) -> None:
    """Nothing is computed while a checkpoint is read: no rank holds a dequantised weight."""
    for name in ("mixtral", "gpt_oss"):
        kept.checkpoint(name, tmp_path / name, BF16)
        built = opened(tmp_path / name, keep_quantised=True)
        expressions = {n: e for n, e in built.expressions.items() if n.endswith(("_qdata", "_scale"))}
        assert any("down_proj" in one for one in expressions)
        assert all(list(copied(e)) == list(leaves(e)) for e in expressions.values())


def test_few_experts_are_chosen_before_they_are_dequantised(tmp_path: Path) -> None:
    """One token has two of the four experts; a grouped matmul, transformers' default, takes all of them."""
    kept.checkpoint("mixtral", tmp_path, F32)
    model = opened(tmp_path, keep_quantised=True).model
    assert model.config._experts_implementation == "grouped_mm"
    for tokens, experts in ((1, 2), (6, 4)):
        bound = bind_call(model, (), {"input_ids": torch.ones(1, tokens, dtype=torch.long)})
        graph = capture(model, bound, dynamic=False).graph_module.graph
        made = [node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), Tensor)]
        sizes = {value.shape[0] for value in made if value.dtype == F32 and value.shape[1:] == (256, 128)}
        assert sizes == {experts}
    assert model.config._experts_implementation == "grouped_mm"


def test_blocks_that_are_cut_short(tmp_path: Path) -> None:
    """A latent projection of 28 rows in blocks of 16, of which transformers makes blocks of 14."""
    kept.checkpoint("deepseek_v3", tmp_path / "in", F32)
    quantised.dequantised_fp8(tmp_path / "in", (16, 16), F32, tmp_path / "plain")
    for error, tokens in run_spmd(spmd.beside_plain, 2, tmp_path / "in", tmp_path / "plain"):
        assert error <= 1e-5 and tokens


def refused(folder: Path, keep_quantised: bool = True, **wishes: object) -> str:
    with pytest.raises(tpcompile.TpCompileError) as error:
        opened(folder, keep_quantised=keep_quantised, **wishes)
    return str(error.value)


def test_what_is_refused(tmp_path: Path) -> None:
    kept.checkpoint("llama", tmp_path / "fp8", BF16)
    assert "or keep_quantised=True" in refused(tmp_path / "fp8", keep_quantised=False)
    assert "says otherwise" in refused(tmp_path / "fp8", quantization_config={"dequantize": True})
    kept.checkpoint("mixtral", tmp_path / "cut", BF16, (24, 16))
    assert "128 rows or columns are joined, in blocks of 24" in refused(tmp_path / "cut")
    kept.plain("llama", tmp_path / "plain")
    assert "the checkpoint is not quantised" in refused(tmp_path / "plain")
    quantised.compressed(tmp_path / "plain", "w8a16")
    assert "(compressed-tensors), and its weights cannot be kept so" in refused(tmp_path / "plain")
    up = "model.layers.0.mlp.up_proj.weight"
    cases: list[tuple[Any, str]] = [
        (lambda s: s.update({f"{up}_scale_inv": torch.ones(8, 5)}), "scales of shape [8, 5]"),
        (lambda s: s.update({f"{up}_scale_inv": torch.ones(())}), "scales of shape []"),
        (lambda s: s.update({up: s[up].float()}), "scales for numbers of type torch.float32"),
        (lambda s: s.pop(f"{up}_scale_inv"), f"{up} has type torch.float8_e4m3fn in the checkpoint"),
        (lambda s: s.pop(up), f"lacks {up}"),
    ]
    for i, (change, said) in enumerate(cases):
        assert said in refused(Path(damaged(tmp_path / "fp8", f"bad{i}", change))), said


def test_scales_of_activations_are_not_written(tmp_path: Path) -> None:
    """They are left out, as where weights are dequantised; a checkpoint without them is not written."""
    kept.checkpoint("llama", tmp_path / "in", BF16)
    extra = {"model.layers.0.mlp.up_proj.activation_scale": torch.ones(())}
    built = opened(Path(damaged(tmp_path / "in", "static", lambda s: s.update(extra))), keep_quantised=True)
    assert not built.unexpected
    with pytest.raises(tpcompile.TpCompileError, match="scales of activations"):
        quantised_metadata(built.model, type(built.model))

"""Quantised checkpoints that are dequantised while they are loaded: bit by bit what transformers loads."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig
from torch import Tensor
from transformers import CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config
from transformers.quantizers import HfQuantizer, auto
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import tpcompile
from tests.helpers import quantised
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import from_pretrained as spmd_from_pretrained
from tests.on_ranks.models import CAPTURED, build, call
from tests.weights.test_checkpoint import fewer
from tests.weights.test_from_pretrained import checkpoint_of, damaged, load_rank, opened, tensors_of
from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.runtime.find_model import find_model, model_meant
from tpcompile.weights.loading.add_adapter import add_adapter
from tpcompile.weights.loading.expressions import Expression
from tpcompile.weights.loading.fill_tensor import Filler
from tpcompile.weights.loading.read_headers import MappedFiles

F32, BF16 = torch.float32, torch.bfloat16
GPT_OSS = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@functools.lru_cache
def planned(name: str, fields: tuple[tuple[str, Any], ...] = ()) -> WeightLayout:
    """A model's layout on 4 ranks."""
    return tpcompile.plan(build(name, **dict(fields)), 4, example_kwargs=call(name, CAPTURED)).layout


class Counting(Filler):
    """Counts the bytes of stored tensors that are looked at."""

    def __init__(self) -> None:
        super().__init__(MappedFiles().read)
        self.seen = 0

    def box(self, e: Expression, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        found = super().box(e, offsets, sizes)
        self.seen += found.nbytes
        return found


def assert_slices(folder: Path, layout: WeightLayout, expected: dict[str, Tensor], **wishes: Any) -> None:
    """Whether every rank of 4, and of 2, gets its slices of what is expected."""
    for lying in (layout, fewer(layout, 2)):
        for rank in range(lying.ranks):
            built = opened(folder, **wishes)
            load_rank(built, lying, rank)
            found = tensors_of(built.model)
            assert found.keys() == expected.keys()
            for key, local in found.items():
                whole = lying.shard(key, expected[key].detach(), rank)
                assert local.dtype == whole.dtype and torch.equal(local, whole), key
    assert not hasattr(built.model.config, "quantization_config")


FP8 = [
    ("llama", BF16, (4, 4), F32),
    ("tied", F32, (4, 4), F32),
    ("mixtral", BF16, (4, 2), torch.float8_e8m0fnu),
]


@pytest.mark.parametrize(("name", "dtype", "block", "scales"), FP8)
def test_fp8(name: str, dtype: torch.dtype, block: Any, scales: torch.dtype, tmp_path: Path) -> None:
    """Blocks that slices cut: 68 rows on 4 ranks in blocks of 4; experts that are merged."""
    model_class = checkpoint_of(name, tmp_path, dtype)
    quantised.fp8(tmp_path, block, scales, modules_to_not_convert=["lm_head"])
    asked = FineGrainedFP8Config(dequantize=True)
    whole = model_class.from_pretrained(tmp_path, quantization_config=asked)
    assert_slices(tmp_path, planned(name), tensors_of(whole), quantization_config=asked)


@pytest.mark.parametrize(
    ("name", "block"), [("llama", (16, 16)), ("deepseek_v3", (16, 8)), ("mixtral", (4, 8))]
)
def test_fp8_blocks_that_are_cut_short(name: str, block: Any, tmp_path: Path) -> None:
    """transformers refuses these, or takes 28 columns in 4 blocks of 8 for blocks of 7.

    Here the checkpoint's own configuration says that it is to be dequantised.
    """
    model_class = checkpoint_of(name, tmp_path / "quantised", BF16)
    quantised.fp8(tmp_path / "quantised", block, dequantize=True)
    quantised.dequantised_fp8(tmp_path / "quantised", block, BF16, tmp_path / "plain")
    whole = model_class.from_pretrained(tmp_path / "plain")
    assert_slices(tmp_path / "quantised", planned(name), tensors_of(whole))


def test_mxfp4(tmp_path: Path) -> None:
    model_class = checkpoint_of("gpt_oss", tmp_path, BF16, **GPT_OSS)
    quantised.mxfp4(tmp_path)
    asked = Mxfp4Config(dequantize=True)
    whole = model_class.from_pretrained(tmp_path, quantization_config=asked)
    layout = planned("gpt_oss", tuple(GPT_OSS.items()))
    assert_slices(tmp_path, layout, tensors_of(whole), quantization_config=asked)


COMPRESSED = [("llama", "w4a16"), ("llama", "w8a16"), ("mixtral", "w4a16"), ("mixtral", "fp8")]


@pytest.mark.parametrize(("name", "kind"), COMPRESSED)
def test_compressed_tensors(name: str, kind: str, tmp_path: Path) -> None:
    model_class = checkpoint_of(name, tmp_path, BF16)
    quantised.compressed(tmp_path, kind, 4)
    asked = CompressedTensorsConfig(run_compressed=False)
    whole = model_class.from_pretrained(tmp_path, quantization_config=copy.deepcopy(asked))
    assert_slices(tmp_path, planned(name), tensors_of(whole), quantization_config=asked)


def looked_at(folder: Path, layout: WeightLayout, **wishes: Any) -> dict[str, tuple[int, int]]:
    """Bytes of the files that all ranks together look at, and one that wants all, per divided parameter."""
    built, found = opened(folder, **wishes), {}
    for name, e in built.expressions.items():
        parts = [part for rank in range(layout.ranks) for part in layout.ranges(name, rank)]
        if sum(torch.Size(part.sizes).numel() for part in parts) == torch.Size(e.shape).numel():
            counts = []
            for boxes in ([(part.offsets, part.sizes) for part in parts], [((0,) * len(e.shape), e.shape)]):
                filler = Counting()
                for offsets, sizes in boxes:
                    filler.fill(torch.empty(sizes), e, offsets)
                assert not filler._whole, name
                counts.append(filler.seen)
            found[name] = (counts[0], counts[1])
    return found


def test_ranks_read_blocks_of_their_slices(tmp_path: Path) -> None:
    """All ranks together little more than one that reads everything, and no operand as a whole."""
    checkpoint_of("llama", tmp_path / "fp8", BF16)
    quantised.fp8(tmp_path / "fp8", (4, 4))
    checkpoint_of("gpt_oss", tmp_path / "mxfp4", BF16, **GPT_OSS)
    quantised.mxfp4(tmp_path / "mxfp4")
    checkpoint_of("llama", tmp_path / "w4a16", BF16)
    quantised.compressed(tmp_path / "w4a16", "w4a16", 4)
    layouts = {"fp8": planned("llama"), "mxfp4": planned("gpt_oss", tuple(GPT_OSS.items()))}
    layouts["w4a16"] = planned("llama")
    for kind, layout in layouts.items():
        found = looked_at(tmp_path / kind, layout, quantization_config={"dequantize": True})
        assert ("mlp.experts.down_proj" if kind == "mxfp4" else "mlp.down_proj.weight") in str(found)
        for name, (parts, whole) in found.items():
            assert whole <= parts <= 1.35 * whole, name  # 17 columns a rank, in words of 8 and groups of 4


def test_loads_decodes_and_saves(tmp_path: Path) -> None:
    """What is saved is an ordinary checkpoint."""
    folder, out = tmp_path / "in", tmp_path / "out"
    model_class = checkpoint_of("mixtral", folder, F32, num_hidden_layers=1)
    quantised.fp8(folder, (4, 4))
    asked = FineGrainedFP8Config(dequantize=True)
    for found in run_spmd(spmd_from_pretrained.load, 2, "mixtral", str(folder), None, str(out), True, asked):
        assert not found["wrong"] and found["error"] <= 1e-5 and found["tokens"] and found["there"]
    expected = model_class.from_pretrained(folder, quantization_config=asked).state_dict()
    state = model_class.from_pretrained(out).state_dict()
    assert state.keys() == expected.keys()
    assert all(state[k].dtype == expected[k].dtype and torch.equal(state[k], expected[k]) for k in state)


def test_an_adapter_around_dequantised_weights(tmp_path: Path) -> None:
    checkpoint_of("llama", tmp_path, BF16, num_hidden_layers=1)
    quantised.fp8(tmp_path, (4, 4))
    built = opened(tmp_path, quantization_config={"dequantize": True})
    found = add_adapter(built, LoraConfig(r=2, target_modules=["up_proj"]), torch.device("cpu"))
    key = "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"
    assert found.expressions[key] == built.expressions["model.layers.0.mlp.up_proj.weight"]
    assert {n for n, p in found.model.named_parameters() if p.requires_grad and not p.is_meta} == {
        f"base_model.model.model.layers.0.mlp.up_proj.lora_{one}.default.weight" for one in "AB"
    }


def test_models_of_quantised_configurations(tmp_path: Path) -> None:
    """What the command line plans and runs is the model of dequantised weights, and it says so."""
    checkpoint_of("llama", tmp_path, BF16)
    quantised.fp8(tmp_path)
    for verifiable in (False, True):
        with pytest.warns(UserWarning, match=r"is quantised \(fp8\).*dequantised, to torch.bfloat16"):
            model = find_model(str(tmp_path), verifiable=verifiable)
        assert not hasattr(model.config, "quantization_config")
        assert {p.dtype for p in model.parameters()} == {BF16}
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="is quantised"):
        model_meant(config)
    assert config.quantization_config is not None


# ------------------------------------------------------------------------------------------------- refusals

UP = "model.layers.1.mlp.up_proj.weight"
DAMAGED: dict[str, tuple[Callable[[dict[str, Tensor]], Any], list[str]]] = {
    "no scale": (
        lambda s: s.pop(f"{UP}_scale_inv"),
        [f"{UP} has type torch.float8_e4m3fn in the checkpoint"],
    ),
    "no weight": (lambda s: s.pop(UP), [f"lacks {UP}"]),
    "fewer scales": (
        lambda s: s.update({f"{UP}_scale_inv": torch.ones(17, 5)}),
        ["conversion failed", f"{UP}: ValueError: scales of shape [17, 5] for a weight of shape [68, 40]"],
    ),
    "one scale": (lambda s: s.update({f"{UP}_scale_inv": torch.ones(1, 1)}), ["scales of shape [1, 1]"]),
    "another shape": (
        lambda s: s.update({UP: s[UP][:64], f"{UP}_scale_inv": torch.ones(16, 10)}),
        [f"{UP} has shape [64, 40] in the checkpoint, [68, 40]", f"{UP}_scale_inv"],
    ),
    "integers": (
        lambda s: s.update({"model.norm.weight": torch.ones(40, dtype=torch.int8)}),
        ["model.norm.weight has type torch.int8"],
    ),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged(kind: str, tmp_path: Path) -> None:
    checkpoint_of("llama", tmp_path / "good", BF16)
    quantised.fp8(tmp_path / "good", (4, 4))
    change, parts = DAMAGED[kind]
    folder = damaged(tmp_path / "good", "bad", change)
    with pytest.raises(tpcompile.TpCompileError) as refused:
        opened(Path(folder), quantization_config={"dequantize": True})
    for part in (*parts, "bad/model.safetensors", "nothing was loaded"):
        assert part in str(refused.value), refused.value


def test_shapes_count_whatever_the_quantizer_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint_of("llama", tmp_path / "good", BF16)
    quantised.fp8(tmp_path / "good", (4, 4))
    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "param_needs_quantization", lambda *args, **kwargs: True)
    folder = damaged(tmp_path / "good", "bad", DAMAGED["another shape"][0])
    with pytest.raises(tpcompile.TpCompileError, match=r"has shape \[64, 40\] in the checkpoint, \[68, 40\]"):
        opened(Path(folder), quantization_config={"dequantize": True})


def test_scales_of_nothing_warn(tmp_path: Path) -> None:
    checkpoint_of("llama", tmp_path / "good", BF16)
    quantised.fp8(tmp_path / "good", (4, 4))
    extra = {"model.layers.7.mlp.up_proj.weight_scale_inv": torch.ones(17, 10)}
    folder = damaged(tmp_path / "good", "extra", lambda s: s.update(extra))
    built = opened(Path(folder), quantization_config={"dequantize": True})
    assert str(built.unexpected).count("model.layers.7.mlp.up_proj.weight") == 1


METHODS: list[tuple[dict[str, Any], Any, list[str]]] = [
    ({"quant_method": "mxfp4"}, None, ["quantised (mxfp4)", "Mxfp4Config(dequantize=True)"]),
    ({"quant_method": "fp8"}, {"dequantize": False}, ["(fp8)", "FineGrainedFP8Config(dequantize=True)"]),
    ({"quant_method": "fp8"}, Mxfp4Config(dequantize=True), ["(fp8)", "cannot be understood", "Mxfp4Config"]),
    ({"quant_method": "fp8"}, 5, ["(fp8)", "cannot be understood"]),
    ({"quant_method": "gptq", "bits": 4}, {"dequantize": True}, ["(gptq)", "dequantize()"]),
    ({"quant_method": "nothing"}, None, ["(nothing)", "cannot be understood"]),
    ({"bits": 4}, None, ["an unnamed method"]),
]


@pytest.mark.parametrize(("config", "given", "parts"), METHODS)
def test_what_is_not_dequantised(config: Any, given: Any, parts: list[str], tmp_path: Path) -> None:
    checkpoint_of("llama", tmp_path)
    quantised.rewrite(tmp_path, lambda tensors: tensors, config)
    with pytest.raises(tpcompile.TpCompileError) as refused:
        opened(tmp_path, quantization_config=given)
    for part in parts:
        assert part in str(refused.value), refused.value


def test_a_version_that_does_not_say_how_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(HfQuantizer, "get_load_operations")  # as in transformers 5.17
    checkpoint_of("llama", tmp_path)
    quantised.fp8(tmp_path)
    said = r"\(fp8\), and transformers (?s:.)* install transformers"
    with pytest.raises(tpcompile.TpCompileError, match=said):
        opened(tmp_path, quantization_config=FineGrainedFP8Config(dequantize=True))


class Finished(HfQuantizer):
    """A method that dequantises finished modules."""

    def is_serializable(self) -> bool:
        """It has no format."""
        return False

    @property
    def is_trainable(self) -> bool:
        """It does not train."""
        return False


class FinishedConfig(QuantizationConfigMixin):
    """Its configuration."""

    def __init__(self, dequantize: bool = False, **fields: Any) -> None:
        self.quant_method, self.dequantize = "finished", dequantize  # type: ignore[assignment]


def test_a_method_without_conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "finished", Finished)
    monkeypatch.setitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "finished", FinishedConfig)
    checkpoint_of("llama", tmp_path)
    quantised.rewrite(tmp_path, lambda tensors: tensors, {"quant_method": "finished", "dequantize": True})
    with pytest.raises(
        tpcompile.TpCompileError, match=r"quantised \(finished\), and dequantised only as a whole"
    ):
        opened(tmp_path)


def test_damaged_in_other_formats(tmp_path: Path) -> None:
    checkpoint_of("gpt_oss", tmp_path / "mxfp4", BF16, **GPT_OSS)
    quantised.mxfp4(tmp_path / "mxfp4")
    checkpoint_of("llama", tmp_path / "w4a16", BF16)
    quantised.compressed(tmp_path / "w4a16", "w4a16", 4)
    up = "model.layers.0.mlp.experts.gate_up_proj"
    for name, kind in (("llama", "w8a16"), ("mixtral", "fp8")):
        checkpoint_of(name, tmp_path / kind, BF16)
        quantised.compressed(tmp_path / kind, kind)
    expert = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    cases: list[tuple[str, Callable[[dict[str, Tensor]], Any], str]] = [
        ("w8a16", lambda s: s.update({f"{UP}_scale": s[f"{UP}_scale"][:1]}), r"shape \[1, 1\] for a weight"),
        ("fp8", lambda s: s.update({f"{expert}_scale": s[f"{expert}_scale"][:1]}), r"shape \[1, 1\] for a"),
        ("mxfp4", lambda s: s.pop(f"{up}_scales"), "gate_up_proj: KeyError"),
        ("mxfp4", lambda s: s.pop(f"{up}_blocks"), "gate_up_proj: KeyError"),
        (
            "mxfp4",
            lambda s: s.update({f"{up}_scales": s[f"{up}_scales"][:, 1:].contiguous()}),
            "AssertionError",
        ),
        ("w4a16", lambda s: s.pop(f"{UP}_scale"), "conversion failed"),
        (
            "w4a16",
            lambda s: s.update({f"{UP}_scale": s[f"{UP}_scale"][:, 1:].contiguous()}),
            "conversion failed",
        ),
        (
            "w4a16",
            lambda s: s.update({f"{UP}_packed": s[f"{UP}_packed"][:, 1:].contiguous()}),
            "conversion failed",
        ),
    ]
    for i, (kind, change, message) in enumerate(cases):
        folder = damaged(tmp_path / kind, f"bad{i}", change)
        with pytest.raises(tpcompile.TpCompileError, match=message):
            opened(Path(folder), quantization_config={"dequantize": True})

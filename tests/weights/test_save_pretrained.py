"""``save_pretrained`` of a sharded model; ``test_from_pretrained`` has it on several ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import tpcompile
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import from_pretrained as spmd_from_pretrained
from tests.on_ranks.models import build
from tests.weights.test_checkpoint import fewer, planned
from tpcompile.compile_program import Compiler
from tpcompile.ir.calls import signature_of
from tpcompile.planner.options import Options
from tpcompile.planner.search.cost import preset
from tpcompile.runtime.module import ShardedModule
from tpcompile.runtime.runtime import Runtime
from tpcompile.runtime.settings import Settings
from tpcompile.weights.loading.expressions import Leaf
from tpcompile.weights.saving.plan_files import plan_files, size_in_bytes
from tpcompile.weights.shard import sharded_class


def shell(model: Any) -> Any:
    """A model on one rank, without programs: capturing would take most of the time."""
    compiler = Compiler(Options(preset("cpu"), {}), 1)
    model._tp = Runtime(compiler, signature_of(model), type(model), Settings(model))
    model.__class__ = sharded_class(type(model), ShardedModule)
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def states_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_neox", "qwen2_vl", "vit", "tied", "bert"])
@pytest.mark.parametrize("original", [True, False])
def test_writes_what_transformers_writes(name: str, original: bool, tmp_path: Path) -> None:
    """The same keys, tensors and configuration; the conversions of a loaded model are reverted."""
    transformers.utils.logging.disable_progress_bar()
    build(name, torch.bfloat16).save_pretrained(tmp_path / "in")  # type: ignore[operator]
    model = type(build(name)).from_pretrained(tmp_path / "in")  # type: ignore[attr-defined]
    model.save_pretrained(tmp_path / "theirs", save_original_format=original)
    shell(model).save_pretrained(tmp_path / "ours", save_original_format=original)
    ours, theirs = contents(tmp_path / "ours"), contents(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert states_equal(*(load_file(tmp_path / f / "model.safetensors") for f in ("ours", "theirs")))
    for key in ours.keys() - {"model.safetensors"}:
        assert json.loads(ours[key]) == json.loads(theirs[key])


def test_mixed_types_are_aligned_and_files_divided(tmp_path: Path) -> None:
    """Files of a given size, tensors of every type at multiples of their size, an index with all of them."""
    model = build("llama")
    model.register_buffer("flag", torch.ones(3, dtype=torch.bool))
    model.register_buffer("count", torch.tensor(7))
    model.lm_head.to(torch.bfloat16)  # type: ignore[union-attr,operator]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    shell(model).save_pretrained(tmp_path, max_shard_size=40_000, variant="odd")
    files = sorted(tmp_path.glob("model.odd-*.safetensors"))
    assert len(files) > 3
    found: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        assert sum(t.nbytes for t in tensors.values()) <= 40_000 or len(tensors) == 1
        found |= tensors
    assert states_equal(found, state)
    index = json.loads((tmp_path / "model.safetensors.index.odd.json").read_text())
    assert index["weight_map"].keys() == state.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in state.values())


def test_other_files_stay_and_old_weights_go(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build("llama").save_pretrained(folder, max_shard_size="40KB")  # type: ignore[operator]
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes").mkdir()
    (folder / "notes" / "a").write_text("b")
    os.symlink("tokenizer.json", folder / "link")
    model = build("tied")
    shell(model).save_pretrained(folder)
    assert sorted(os.listdir(folder)) == [
        "config.json",
        "generation_config.json",
        "link",
        "model.safetensors",
        "notes",
        "tokenizer.json",
    ]
    assert (folder / "notes" / "a").read_text() == "b" and os.readlink(folder / "link") == "tokenizer.json"
    assert os.listdir(tmp_path) == ["model"]
    assert states_equal(type(model).from_pretrained(folder).state_dict(), model.state_dict())  # type: ignore[attr-defined]


def test_one_replica_of_several_writes(tmp_path: Path) -> None:
    """Two models over two ranks each: packed segments are put together, once."""
    name = "phi3_unequal_segments"
    layout = fewer(planned(name, 4), 2).to_json()
    for found in run_spmd(spmd_from_pretrained.save_replicas, 4, name, layout, str(tmp_path / "out")):
        assert all(found)
    model: Any = build(name)
    state = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert states_equal(state, model.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"push_to_hub": True}, "not saved with push_to_hub"),
        ({"safe_serialization": False}, "not saved with safe_serialization"),
        ({"state_dict": {}}, "not saved with state_dict"),
        ({"distributed_checkpoint": True}, "not saved with distributed_checkpoint"),
        ({"commit_message": "x"}, "not saved with commit_message"),
        ({"max_shard_size": "many"}, "'many' is not a size"),
        ({"is_main_process": False}, "no rank may write"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    answer = "accepted"
    try:
        shell(build("llama")).save_pretrained(tmp_path / "new", **arguments)
    except tpcompile.TpCompileError as refusal:
        answer = str(refusal)
    assert message in answer
    assert (tmp_path / "new").exists() == (answer == "accepted")


def fill_disk(patch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10})
    patch.setattr("shutil.disk_usage", lambda path: usage)


def have_state(patch: pytest.MonkeyPatch, model: Any) -> None:
    patch.setattr(type(model.model.norm), "get_extra_state", lambda self: torch.ones(2))


def lose_slice(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(torch.empty(3, 3, device="meta"))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda patch, path, model: fill_disk(patch), "the disk has 10"),
        (lambda patch, path, model: path.write_text("a file"), "a file of this name"),
        (lambda patch, path, model: path.parent.joinpath("under").write_text(""), "cannot be written"),
        (lambda patch, path, model: lose_slice(model), "the weight has no values"),
        (lambda patch, path, model: have_state(patch, model), "neither a parameter nor a buffer"),
    ],
)
def test_what_cannot_be_written(
    prepare: Callable[..., Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = shell(build("llama")), tmp_path / "model"
    prepare(monkeypatch, path, model)
    if (tmp_path / "under").exists():
        path = tmp_path / "under" / "model"
    with pytest.raises(tpcompile.TpCompileError) as refusal:
        model.save_pretrained(path)
    assert message in str(refusal.value)
    assert not [name for name in os.listdir(tmp_path) if "saving" in name]


def test_a_module_of_torch_has_no_checkpoint_of_transformers(tmp_path: Path) -> None:
    with pytest.raises(tpcompile.TpCompileError, match="Linear is not a model of transformers"):
        shell(nn.Linear(3, 3)).save_pretrained(tmp_path / "new")


def test_sizes_and_files() -> None:
    assert size_in_bytes("5GB") == 5 * 10**9 and size_in_bytes("2 MiB") == 2**21 and size_in_bytes(7) == 7
    tensors = {str(i): Leaf((size,), torch.float32, str(i)) for i, size in enumerate([1, 1, 5, 1])}
    files = plan_files(tensors, 8, None, {})
    assert [list(file.tensors) for file in files] == [["0", "1"], ["2"], ["3"]]
    assert files[0].name == "model-00001-of-00003.safetensors"
    assert len(files[0].header()) % 8 == 0

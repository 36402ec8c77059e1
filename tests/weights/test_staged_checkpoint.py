"""A save is stopped at every change of a file: what loads then is the old checkpoint or the new one."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import tpcompile
from tests.weights.test_from_pretrained import opened
from tests.weights.test_save_pretrained import shell, states_equal
from tpcompile.weights.loading.fill_tensor import Filler
from tpcompile.weights.loading.read_headers import MappedFiles

CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
FILES, FEWER = "1.2KB", "2KB"

_watched: list[Any] = []


def _on_event(event: str, args: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if _watched and (event in CHANGES or writes):
        look = _watched.pop()
        look()
        _watched.append(look)


sys.addaudithook(_on_event)


@contextmanager
def stopped_at_every_change(folder: Path, stops: Path) -> Iterator[None]:
    """Copies a folder before every change of any file: what a process that was killed there would have left.

    Changes in subfolders of a save alone are left out: nothing points there, or it is finished.
    """
    before: list[Any] = []

    def look() -> None:
        places = [path for path in folder.rglob("*") if not path.parent.name.startswith("saving-")]
        now = [(path.name, (facts := path.lstat()).st_ino, facts.st_size, facts.st_mtime) for path in places]
        if folder.exists() and now not in before:
            shutil.copytree(folder, stops / f"{len(before):03}", symlinks=True)
            before.append(now)

    stops.mkdir()
    _watched.append(look)
    try:
        yield
    finally:
        _watched.clear()


def tiny(seed: int, **fields: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 16}
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(**{**sizes, "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2, **fields})
    )


def load(folder: Path, **options: Any) -> dict[str, Tensor]:
    return LlamaForCausalLM.from_pretrained(folder, **options).state_dict()


def load_ours(folder: Path, **wishes: Any) -> dict[str, Tensor]:
    built, files = opened(folder, **wishes), MappedFiles()
    filler = Filler(files.read)  # type: ignore[arg-type]
    found = {name: filler.whole(expression).clone() for name, expression in built.expressions.items()}
    tied = built.model.all_tied_weights_keys
    return found | {key: found[source] for key, source in tied.items()}


def entries(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


SAVES: list[tuple[dict[str, Any] | None, dict[str, Any], dict[str, Any]]] = [
    # How the old one was saved, how the new one is, and what is different in its configuration.
    (None, {}, {}),
    (None, {"max_shard_size": FILES}, {}),
    ({}, {}, {}),
    ({}, {"max_shard_size": FILES}, {}),
    ({"max_shard_size": FILES}, {}, {}),
    ({"max_shard_size": FILES}, {"max_shard_size": FILES}, {}),  # the same names
    ({"max_shard_size": FILES}, {"max_shard_size": FEWER}, {}),  # other names
    ({}, {}, {"vocab_size": 24}),
    ({}, {"max_shard_size": FILES}, {"tie_word_embeddings": True}),
    ({"max_shard_size": FILES}, {}, {"tie_word_embeddings": True}),
    ({"max_shard_size": FILES}, {"max_shard_size": FILES}, {"hidden_size": 12}),
    ({"max_shard_size": FILES, "variant": "x"}, {"max_shard_size": FILES, "variant": "x"}, {}),
]


@pytest.mark.parametrize(("before", "after", "fields"), SAVES)
def test_stopped_anywhere(
    before: dict[str, Any] | None, after: dict[str, Any], fields: dict[str, Any], tmp_path: Path
) -> None:
    folder, stops = tmp_path / "model", tmp_path / "stops"
    old, new = shell(tiny(0)), shell(tiny(1, **fields))
    wanted = [old.state_dict(), new.state_dict()]
    if before is not None:
        old.save_pretrained(folder, **before)
        (folder / "notes").mkdir()
        (folder / "notes" / "mine").write_text("mine")
    with stopped_at_every_change(folder, stops):
        new.save_pretrained(folder, **after)
    shutil.copytree(folder, stops / "done")
    variant = {"variant": after["variant"]} if "variant" in after else {}
    seen = []
    for stop in sorted(stops.iterdir()):
        if before is None and not (stop / "config.json").exists():
            continue
        for found in (load(stop, **variant), load_ours(stop, **variant)):
            which = [states_equal(found, state) for state in wanted]
            assert any(which), f"{stop.name}: neither the old checkpoint nor the new one"
            seen.append(which.index(True))
        assert before is None or (stop / "notes" / "mine").read_text() == "mine"
    assert seen == sorted(seen) and seen[-1] == 1
    assert before is None or seen[0] == 0
    assert not [name for name in entries(folder) if "saving" in name], "something is left"
    # What a stopped save has left does not disturb the next one, which removes it.
    middle = sorted(stops.iterdir())[len(seen) // 4 + 1]
    new.save_pretrained(middle, **after)
    assert entries(middle) == entries(folder)
    assert states_equal(load(middle, **variant), wanted[1])


CODE = """
import torch
from transformers import PreTrainedModel
from .configuration_own import NAME, OwnConfig

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        setattr(self, NAME, torch.nn.Linear(config.width, config.width))
        self.post_init()

    def forward(self, x):
        return getattr(self, NAME)(x)
"""
CONFIGURATION = """
from transformers import PreTrainedConfig
NAME = "{name}"

class OwnConfig(PreTrainedConfig):
    model_type = "own_code"
    width: int = 4
"""


def own_model(folder: Path, name: str, width: int) -> Any:
    """A model whose code is written here, and says how its layer is called."""
    folder.mkdir()
    (folder / "modeling_own.py").write_text(CODE)
    (folder / "configuration_own.py").write_text(CONFIGURATION.format(name=name))
    code = importlib.import_module(f"{folder.name}.modeling_own")
    code.OwnConfig.register_for_auto_class()
    code.OwnModel.register_for_auto_class("AutoModel")
    torch.manual_seed(0)
    return shell(code.OwnModel(code.OwnConfig(width=width)))


@pytest.mark.parametrize("width", [4, 6])
def test_stopped_anywhere_with_code_of_its_own(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, configuration and code are those of one checkpoint, also where only the code differs."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder, stops = tmp_path / "model", tmp_path / "stops"
    old, new = (
        own_model(tmp_path / f"old{width}", "first", 4),
        own_model(tmp_path / f"new{width}", "second", width),
    )
    wanted, seen = [old.state_dict(), new.state_dict()], []
    old.save_pretrained(folder)
    with stopped_at_every_change(folder, stops):
        new.save_pretrained(folder)
    shutil.copytree(folder, stops / "done")
    for stop in sorted(stops.iterdir()):
        model = transformers.AutoModel.from_pretrained(stop, trust_remote_code=True)
        ours = load_ours(stop, trust_remote_code=True)
        for found in (model.state_dict(), ours):
            which = [states_equal(found, state) for state in wanted]
            assert any(which), f"{stop.name}: neither the old checkpoint nor the new one"
            seen.append(which.index(True))
    assert seen == sorted(seen) and (seen[0], seen[-1]) == (0, 1) and len(seen) > 10
    assert not [name for name in entries(folder) if "saving" in name], "something is left"


def test_another_variant_stays(tmp_path: Path) -> None:
    """Variants of one folder do not know of each other, also where a save of one was stopped midway."""
    folder, stops = tmp_path / "model", tmp_path / "stops"
    one, two = shell(tiny(0)), shell(tiny(1))
    states = [one.state_dict(), two.state_dict()]
    one.save_pretrained(folder, max_shard_size=FILES, variant="x")
    with stopped_at_every_change(folder, stops):
        one.save_pretrained(folder, max_shard_size=FILES, variant="x")
    index = "model.safetensors.index.x.json"
    midway = [stop for stop in sorted(stops.iterdir()) if "saving-" in (stop / index).read_text()]
    for stop in (midway[0], midway[-1]):
        two.save_pretrained(stop)
        assert states_equal(load(stop, variant="x"), states[0]) and states_equal(load(stop), states[1])


def test_the_users_files_stay(tmp_path: Path) -> None:
    """Names that look like a checkpoint's, links, folders that cannot be written, the folder itself."""
    folder = tmp_path / "model"
    folder.mkdir(mode=0o750)
    names = ["model-best.safetensors", "model.safetensors.bak", "model-1-of-2.safetensors", ".saving-mine"]
    names += ["pytorch_model.bin", "adapter_model.safetensors", "model.fp16.safetensors", "tokenizer.json"]
    for name in names:
        (folder / name).write_text(name)
    (folder / "closed").mkdir()
    (folder / "closed" / "file").write_text("closed")
    (folder / "closed").chmod(0o500)
    outside = tmp_path / "outside"
    outside.write_text("outside")
    (folder / "model.safetensors").symlink_to(outside)
    (folder / "nowhere").symlink_to("gone")
    number = folder.stat().st_ino
    shell(tiny(0)).save_pretrained(folder)
    assert [(folder / name).read_text() for name in names] == names
    assert (folder / "closed" / "file").read_text() == "closed" and outside.read_text() == "outside"
    assert os.readlink(folder / "nowhere") == "gone" and not (folder / "model.safetensors").is_symlink()
    assert (folder.stat().st_ino, folder.stat().st_mode & 0o777) == (number, 0o750)


def test_into_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = shell(tiny(0))
    for place in (".", Path(), tmp_path.name + "/..", tmp_path):
        (tmp_path / tmp_path.name).mkdir(exist_ok=True)
        model.save_pretrained(place)
        assert os.path.samefile(".", tmp_path) and states_equal(load(tmp_path), model.state_dict())
    with pytest.raises(tpcompile.TpCompileError, match="name of the folder is empty"):
        model.save_pretrained("")
    assert os.path.samefile(".", tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model-00001-of-00004.safetensors"])
def test_a_folder_where_a_file_has_to_be(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(tpcompile.TpCompileError, match=f"a folder named {name}"):
        shell(tiny(0)).save_pretrained(tmp_path, max_shard_size=FILES)
    assert entries(tmp_path) == {name}


def test_folders_that_were_made_for_nothing_go_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(tpcompile.TpCompileError, match="the disk has 10"):
        shell(tiny(0)).save_pretrained(tmp_path / "empty" / "a" / "b")
    assert entries(tmp_path) == {"empty"}


def test_files_are_copied_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no links here")

    shell(tiny(0)).save_pretrained(tmp_path, max_shard_size=FILES)
    monkeypatch.setattr(os, "link", refuse)
    model = shell(tiny(1))
    model.save_pretrained(tmp_path, max_shard_size=FILES)
    assert states_equal(load(tmp_path), model.state_dict())


def test_an_error_midway_leaves_what_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename that the system refuses, at every one: the old checkpoint loads, or the new one."""
    folder = tmp_path / "model"
    old, new = shell(tiny(0)), shell(tiny(1, hidden_size=12))
    states, rename, answers = [old.state_dict(), new.state_dict()], os.rename, []
    for last in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        old.save_pretrained(folder, max_shard_size=FILES)
        left = iter(range(last))

        def refused(*args: Any, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise PermissionError("not here")
            rename(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, "rename", refused)
            try:
                new.save_pretrained(folder, max_shard_size=FILES)
                break
            except tpcompile.TpCompileError as error:
                assert "not here" in str(error) and "is whole" in str(error)
        answers.append([states_equal(load(folder), state) for state in states])
    assert answers == sorted(answers, reverse=True) and all(map(any, answers)) and len(answers) > 8
    assert [True, False] in answers and [False, True] in answers

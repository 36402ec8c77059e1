"""Captures and plans on disk: found again in a fresh process, and never where anything has changed."""

from __future__ import annotations

import contextlib
import copy
import importlib
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import tpcompile
from tests.helpers import families
from tests.helpers.run_ranks import run_spmd
from tests.helpers.toys import Mlp, Rearranged
from tpcompile import disk_cache
from tpcompile.capture.export.captured import Captured
from tpcompile.capture.repeats.capture_repeated import ShortCapture, capture_repeated, unroll_captured
from tpcompile.capture.store import describe_code
from tpcompile.capture.store import store_capture as store
from tpcompile.capture.store.store_capture import capture_cached, capture_name
from tpcompile.disk_cache import read_entry, write_entry
from tpcompile.ir.calls import bind_call, flatten_call
from tpcompile.ir.print_graph import graph_text

NAME = "test-" + 64 * "0"
X = torch.arange(2 * 5 * 12.0).reshape(2, 5, 12) / 50


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that is on."""
    path = tmp_path / "cache"
    monkeypatch.setenv("TPCOMPILE_CACHE", "1")
    monkeypatch.setenv("TPCOMPILE_CACHE_DIR", str(path))
    return path


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What is logged as a warning (pytest's own log capture is off)."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Keep(logging.WARNING)
    logging.getLogger("tpcompile").addHandler(handler)
    yield said
    logging.getLogger("tpcompile").removeHandler(handler)


def no_export(*args: Any, **kwargs: Any) -> Any:
    """Stands in the place of ``torch.export.export``."""
    raise AssertionError("exported again")


def run(captured: Captured, model: nn.Module, bound: dict[str, Any]) -> list[Tensor]:
    leaves, _ = flatten_call(bound)
    assert captured.accepts(leaves) is None
    tables: dict[str, Any] = {
        "param": dict(model.named_parameters()),
        "buffer": dict(model.named_buffers()),
        "constant": captured.constants,
    }
    users = iter(leaves)
    inputs = [next(users) if s.kind == "user" else tables[s.kind][s.name] for s in captured.inputs]
    with torch.no_grad():
        result = captured.unflatten(captured.graph_module(*inputs), bound)
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


# --------------------------------------------------------------------------------------------- whole models

MODELS = ("llama", "mixtral", "bert", "plain")


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    if name == "plain":
        return Rearranged().eval(), {"x": X}
    return families.build(name), families.inputs(name)


def results(name: str) -> tuple[str, list[Tensor], dict[str, Any]]:
    """What a user sees of a model: its captured graph, what the graph computes, its plan."""
    model, kwargs = build(name)
    bound = bind_call(model, (), kwargs)
    captured = capture_cached(model, bound)
    plan = tpcompile.plan(model, 2, (), kwargs).to_json()
    return graph_text(captured.graph_module.graph), run(captured, model, bound), plan


def start(path: str) -> None:
    """In a fresh process: all results (earlier tests may have left globals behind in their own)."""
    torch.save([results(name) for name in MODELS], path)


def restart(path: str) -> None:
    """In a fresh process: all results once more, without export and without planning."""
    torch.export.export = no_export
    for module in ("tpcompile.compile_program", "tpcompile.capture.store.store_capture"):
        vars(importlib.import_module(module)).update(plan_program=no_export, capture_repeated=no_export)
    torch.save([results(name) for name in MODELS], path)


def test_a_restart_finds_captures_and_plans(folder: Path, tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    for seed, function in (("3", "start"), ("7", "restart")):
        code = f"from tests.capture import test_disk_cache as t; t.{function}({str(tmp_path / function)!r})"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    first = torch.load(tmp_path / "start", weights_only=False)
    again = torch.load(tmp_path / "restart", weights_only=False)
    for name, (text, outputs, plan), (text2, outputs2, plan2) in zip(MODELS, first, again, strict=True):
        assert text == text2, name
        assert json.dumps(plan) == json.dumps(plan2), name
        model, kwargs = build(name)
        eager = [t for t in tree_leaves(model(**kwargs)) if isinstance(t, Tensor)]
        for one, two, wanted in zip(outputs, outputs2, eager, strict=True):
            assert torch.equal(one, two), name
            torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)


def test_repeated_layers_and_a_cache_come_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.build("llama", num_hidden_layers=7)
    prefill = bind_call(model, (), {"input_ids": families.token_ids(), "use_cache": False})
    short = capture_cached(model, prefill)
    assert isinstance(short, ShortCapture)
    with torch.no_grad():
        past = model(families.token_ids(), use_cache=True).past_key_values
    decode = bind_call(model, (families.token_ids(seq=1),), {"past_key_values": past, "use_cache": True})
    step = capture_cached(model, decode)
    monkeypatch.setattr(store, "capture_repeated", no_export)
    for bound, one in ((prefill, short), (decode, step)):
        two = capture_cached(model, bound)
        assert type(two) is type(one)
        assert graph_text(two.graph_module.graph) == graph_text(one.graph_module.graph)
        fields = ("inputs", "outputs", "in_spec", "out_spec", "ranges", "guards", "notes")
        assert all(getattr(one, field) == getattr(two, field) for field in fields)
        assert getattr(one, "blocks", None) == getattr(two, "blocks", None)
        assert two is not one
    again = copy.deepcopy(decode)  # a run writes into its cache
    for ours, theirs in zip(
        run(unroll_captured(capture_cached(model, decode)), model, decode),
        run(unroll_captured(step), model, again),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


def sharded(path: str, forbid: bool) -> tuple[Tensor, Tensor]:
    """On a rank: the outputs of a sharded model, whole and sharded, at another size than the example's."""
    with (
        patch.dict(os.environ, TPCOMPILE_CACHE="1", TPCOMPILE_CACHE_DIR=path),
        contextlib.ExitStack() as stack,
    ):
        if forbid:
            stack.enter_context(patch.object(torch.export, "export", no_export))
            stack.enter_context(patch.object(store, "capture_repeated", no_export))
        model = families.build("llama")
        call = {"input_ids": families.token_ids(2, 9), "use_cache": False}
        with torch.no_grad():
            whole = model(**call).logits
            model = tpcompile.parallelize(model, None, (), families.inputs("llama"))
            return whole, model(**call).logits


def test_ranks_write_and_read_at_once(folder: Path) -> None:
    for forbid in (False, True):
        for whole, ours in run_spmd(sharded, 2, str(folder), forbid, timeout=300.0):
            torch.testing.assert_close(ours, whole, rtol=1e-4, atol=1e-5)
    assert sorted(path.name.split("-")[0] for path in folder.iterdir()) == ["capture", "plan"]


# ----------------------------------------------------------------------------------------- what makes a miss


class Scaled(nn.Module):
    """A module with a bit of everything that a graph may depend on."""

    factor = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.shift = torch.tensor([1.0, 2.0])
        self.options = {"sizes": [3, 4], "act": torch.relu}
        self.config = families.Family("x", Mlp, families.causal_inputs)

    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        y: Tensor = helper(self.linear(x)) * self.factor + self.shift.sum()
        return y * 2 if double else y


def helper(x: Tensor) -> Tensor:
    return x + 1


def name_of(model: nn.Module, *args: Any, dynamic: Any = True, **kwargs: Any) -> str | None:
    return capture_name(model, bind_call(model, args, kwargs), dynamic, None)


def _eval(model: Any) -> None:
    model.eval()


def _change_option(model: Any) -> None:
    model.options["sizes"][1] = 5


def _change_constant(model: Any) -> None:
    model.shift[0] = 3.0


def _change_function(model: Any) -> None:
    model.options["act"] = torch.sigmoid


def _change_object(model: Any) -> None:
    model.config = families.Family("y", Mlp, families.causal_inputs)


def _freeze(model: Any) -> None:
    model.linear.bias.requires_grad_(False)


def _tie(model: Any) -> None:
    model.linear.bias = nn.Parameter(torch.zeros(12))
    model.register_parameter("other", model.linear.bias)


def _change_dtype(model: Any) -> None:
    model.to(torch.bfloat16)


def _own_forward(model: Any) -> None:
    model.forward = lambda x: x


@pytest.mark.parametrize(
    "change",
    [
        *(_eval, _change_option, _change_constant, _change_function, _change_object),
        *(_freeze, _tie, _change_dtype, _own_forward),
    ],
)
def test_a_changed_model_is_missed(folder: Path, change: Callable[[Any], None]) -> None:
    model, same = Scaled(), Scaled()
    first = name_of(model, X)
    assert first is not None and first == name_of(same, X)
    change(model)
    assert name_of(model, X) not in (first, None)


def test_a_changed_call_is_missed(folder: Path) -> None:
    model = Scaled()
    with torch.no_grad():
        without_grad = name_of(model, X)
    with torch.autocast("cpu"):
        cast = name_of(model, X)
    names = [
        *(name_of(model, X), without_grad, cast, name_of(model, X.double()), name_of(model, X[:, :4])),
        *(name_of(model, X[0]), name_of(model, X, True), name_of(model, X, False), name_of(model, X, 1)),
        *(name_of(model, X, dynamic=False), name_of(model, X, dynamic={"x": {0: True}})),
        *(name_of(model, X.clone().requires_grad_()), name_of(model, x=X, double=0)),
    ]
    assert len(set(names)) == len(names) and None not in names
    # Values of tensors are no part of it, nor is how the call was written.
    assert name_of(model, X) == name_of(model, x=X + 1)


def test_replaced_code_is_missed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Scaled()
    names = [name_of(model, X)]
    with monkeypatch.context() as patch:
        patch.setattr(Scaled, "factor", 3.0)
        names.append(name_of(model, X))
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "helper", lambda x: x + 2)
        names.append(name_of(model, X))
    with monkeypatch.context() as patch:
        patch.setattr(Scaled, "forward", lambda self, x: x)
        names.append(name_of(model, X))
    assert len(set(names)) == 4 and None not in names
    assert name_of(model, X) == names[0]


def test_a_changed_config_is_missed(folder: Path) -> None:
    model, kwargs = build("llama")
    first = name_of(model, **kwargs)
    assert first is not None
    for field, value in (("rms_norm_eps", 1e-3), ("_attn_implementation", "eager")):
        model, _ = build("llama")
        setattr(model.config, field, value)
        assert name_of(model, **kwargs) not in (first, None)
    model, _ = build("llama")
    assert name_of(model, **kwargs) == first


def test_changed_sources_are_missed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the model, those that they import, and our own."""
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "made_up_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tool.py").write_text("def tool(x):\n    return x + 1\n")
    (package / "model.py").write_text(
        "from torch import nn\nfrom . import tool\nclass M(nn.Module):\n"
        "    def forward(self, x):\n        return tool.tool(x)\n"
    )
    model = importlib.import_module("made_up_package.model").M()
    names = [name_of(model, X)]
    for file in ("model.py", "tool.py"):
        (package / file).write_text((package / file).read_text() + "# changed\n")
        names.append(name_of(model, X))
    monkeypatch.setattr(store, "_own_sources", lambda: "others")
    names.append(name_of(model, X))
    monkeypatch.setattr(torch, "__version__", "1.0")
    names.append(name_of(model, X))
    assert len(set(names)) == 5 and None not in names


def test_each_file_is_read_once_and_none_for_type_checkers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large library on the path (an editable install of transformers) is looked through in seconds."""
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "lazy_package"
    package.mkdir()
    lazily = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import unused\n"
    (package / "__init__.py").write_text(lazily + "else:\n    from . import used\n")
    (package / "unused.py").write_text("")
    (package / "used.py").write_text("from . import tool\n")
    (package / "tool.py").write_text("from . import used\ndef tool(x):\n    return x + 1\n")
    (package / "model.py").write_text(
        "from torch import nn\nfrom .tool import tool\nclass M(nn.Module):\n"
        "    def forward(self, x):\n        return tool(x)\n"
    )
    read: list[str] = []
    imported_files = describe_code._imported_files

    def reads(path: str) -> Iterator[str]:
        read.append(path)
        return imported_files(path)

    monkeypatch.setattr(describe_code, "_imported_files", reads)

    assert name_of(importlib.import_module("lazy_package.model").M(), X) is not None
    read = [Path(path).name for path in read if path.startswith(str(package))]
    assert sorted(read) == ["__init__.py", "model.py", "tool.py", "used.py"]


class Lazy(nn.Module):
    """Holds what nothing can look into."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


@pytest.mark.parametrize(
    "held",
    [itertools.count(), threading.Lock(), torch.Generator(), [{"deep": iter(())}], torch.empty(1 << 21)],
    ids=lambda held: type(held).__name__,
)
def test_what_cannot_be_described_is_not_kept(folder: Path, held: Any) -> None:
    model = Lazy(held)
    bound = bind_call(model, (X,), {})
    assert capture_name(model, bound, True, None) is None
    assert torch.equal(run(capture_cached(model, bound), model, bound)[0], model(X))
    assert not list(folder.iterdir())


def test_hooks_and_classes_without_source_are_not_kept(folder: Path) -> None:
    model = Scaled()
    model.linear.register_forward_hook(lambda *_: None)
    assert name_of(model, X) is None
    space: dict[str, Any] = {"nn": nn, "__name__": "nowhere"}
    exec("class M(nn.Module):\n    def forward(self, x):\n        return x", space)
    assert name_of(space["M"](), X) is None


def test_plans_are_kept_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mlp()

    def plan(ranks: int = 2, x: Tensor = X, **options: Any) -> set[str]:
        before = set(folder.glob("*"))
        tpcompile.plan(model, ranks, (x,), **options)
        return {path.name.split("-")[0] for path in set(folder.glob("*")) - before}

    assert plan() == {"capture", "plan"}
    assert plan() == set()
    # Of another example the graph may be the same, but the times that are compared are not.
    assert plan(x=torch.cat([X, X])) == {"capture", "plan"}
    assert plan(ranks=4) == {"plan"}
    assert plan(cost_model="cpu") == {"plan"}
    assert plan(plan={"up": "replicate"}) == {"plan"}
    assert plan(memory=1e9) == {"plan"}
    monkeypatch.setattr("tpcompile.rules.table._USER", {"made.up": "a -> a"})
    assert plan() == {"plan"}


# --------------------------------------------------------------------------------------------- bad entries


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def replace(path: Path) -> None:
    write_entry(path.name, b"something else")


def expose(path: Path) -> None:
    path.chmod(0o644)


@pytest.mark.parametrize("spoil", [damage, truncate, replace, expose])
def test_a_bad_entry_is_ignored_and_rewritten(
    folder: Path, spoil: Callable[[Path], None], warnings: list[str]
) -> None:
    model = Mlp()
    first = tpcompile.plan(model, 2, (X,))
    entries = sorted(folder.iterdir())
    assert [path.stat().st_mode & 0o777 for path in [folder, *entries]] == [0o700, 0o600, 0o600]
    good = [path.read_bytes() for path in entries]
    for path in entries:
        spoil(path)
    assert tpcompile.plan(model, 2, (X,)) == first
    assert len(warnings) == 2 and all("is ignored" in line for line in warnings)
    assert sorted(folder.iterdir()) == entries
    assert entries[1].read_bytes() == good[1]
    warnings.clear()
    assert tpcompile.plan(model, 2, (X,)) == first
    assert not warnings


def test_a_graph_that_differs_from_what_was_stored_is_refused(
    folder: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Mlp()
    bound = bind_call(model, (X,), {})
    with monkeypatch.context() as patch:
        patch.setattr(store, "_fingerprint", lambda graph: "another")
        capture_cached(model, bound)
    assert torch.equal(run(capture_cached(model, bound), model, bound)[0], model(X))
    assert "the graph is another one" in warnings[0]


def test_files_of_others_are_not_read(folder: Path, warnings: list[str]) -> None:
    write_entry(NAME, b"ours")
    assert read_entry(NAME) == b"ours"
    (folder / NAME).rename(folder / "elsewhere")
    (folder / NAME).symlink_to(folder / "elsewhere")
    assert read_entry(NAME) is None
    (folder / NAME).unlink()
    (folder / NAME).mkdir()
    assert read_entry(NAME) is None
    write_entry(NAME, b"ours")  # it cannot take the place of a folder
    assert len(warnings) == 3
    (folder / NAME).rmdir()
    if os.geteuid() == 0:
        write_entry(NAME, b"ours")
        os.chown(folder / NAME, 12345, -1)
        assert read_entry(NAME) is None
        assert "another user" in warnings[-1]
        write_entry(NAME, b"ours")
        assert read_entry(NAME) == b"ours"
    folder.chmod(0o777)
    assert read_entry(NAME) is None
    assert "others can write" in warnings[-1]


def test_a_folder_that_cannot_be_is_no_error(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TPCOMPILE_CACHE", "1")
    monkeypatch.setenv("TPCOMPILE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    write_entry(NAME, b"ours")
    assert read_entry(NAME) is None
    assert warnings


def test_the_oldest_are_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"test-{number:064x}" for number in range(6)]
    monkeypatch.setattr(disk_cache, "MOST_ENTRIES", 3)
    folder.mkdir(mode=0o700)
    (folder / "of the user").write_text("not ours")
    (folder / ".tpcompile-part-old").write_text("")
    os.utime(folder / ".tpcompile-part-old", (0, 0))
    for number, name in enumerate(names[:4]):
        write_entry(name, b"x")
        os.utime(folder / name, (1000 + number, 1000 + number))
    assert sorted(p.name for p in folder.iterdir()) == ["of the user", *names[1:4]]
    assert read_entry(names[1])  # used, hence young again
    write_entry(names[4], b"x")
    assert sorted(p.name for p in folder.iterdir()) == ["of the user", names[1], names[3], names[4]]
    monkeypatch.setattr(disk_cache, "MOST_BYTES", 450)
    write_entry(names[5], 300 * b"x")
    assert [p.name for p in folder.iterdir() if p.name.startswith("test")] == [names[5]]
    write_entry(names[0], 501 * b"x")
    assert not (folder / names[0]).exists()


def write_often(path: str) -> int:
    """On a rank: writes and reads one entry as fast as it can; how often it read something whole."""
    with patch.dict(os.environ, TPCOMPILE_CACHE="1", TPCOMPILE_CACHE_DIR=path):
        found = []
        for number in range(200):
            write_entry(NAME, bytes([number]) * 50_000)
            found.append(read_entry(NAME))
    return sum(f is not None and len(f) == 50_000 and len(set(f)) == 1 for f in found)


def test_entries_are_written_whole(folder: Path) -> None:
    assert run_spmd(write_often, 2, str(folder)) == [200, 200]


@pytest.mark.parametrize("value", ["0", "off"])
def test_it_can_be_switched_off(folder: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TPCOMPILE_CACHE", value)
    tpcompile.plan(Mlp(), 2, (X,))
    assert not folder.exists()


def test_other_tests_use_a_folder_of_this_run() -> None:
    folder = disk_cache.cache_folder()
    assert folder is not None and folder.name.startswith("tpcompile-captures-")
    assert run_spmd(disk_cache.cache_folder, 2) == [folder, folder]


def test_constants_keep_their_values(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bound = Rearranged().eval(), {"x": X}
    one = capture_cached(model, bound)
    assert one.constants
    monkeypatch.setattr(store, "capture_repeated", no_export)
    two = capture_cached(model, bound)
    assert one.constants.keys() == two.constants.keys()
    assert all(torch.equal(value, two.constants[name]) for name, value in one.constants.items())
    assert store.capture_repeated is not capture_repeated


class Copied(nn.Module):
    """A clone in another order of its dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.t().clone(memory_format=torch.contiguous_format)


def test_an_entry_names_no_module_of_the_users() -> None:
    """pickle would look a memory format up in any module that has imported torch, a script for instance."""
    captured = capture_repeated(Copied(), {"x": torch.zeros(3, 4)})
    data = store.dump_captured(captured)
    assert b"\x8c\x17torch.contiguous_format" not in data  # as pickle writes the name of what it looks up
    for program in (captured, store.load_captured(data)):
        (clone,) = (n for n in program.graph_module.graph.nodes if "clone" in str(n.target))
        assert clone.kwargs["memory_format"] is torch.contiguous_format

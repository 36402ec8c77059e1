"""Checkpoints whose files say nonsense: refused before anything is loaded, whatever the nonsense."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from tests.on_ranks.bad_input import refusal
from tests.weights.test_from_pretrained import opened
from tests.weights.test_staged_checkpoint import tiny
from tpcompile.errors import TpCompileError
from tpcompile.weights.loading.find_files import INDEX, find_files
from tpcompile.weights.loading.read_headers import read_header

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    3,
    2.0,
    1.5,
    math.inf,
    -math.inf,
    math.nan,
    "3",
    "x",
    "",
    "\0",
    "../x",
]
VALUES += [[], {}, [1, 2], {"a": 1}, [None], ["F32"], [[]]]
HUGE: list[Any] = [10**30, 1 << 62, [0, 1 << 62], [1 << 62, 1 << 62, 0]]
FEW = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
DEEP = '{"a":' * 100_000


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several files."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny(0).save_pretrained(folder, max_shard_size="2KB")
    return folder


def changed(folder: Path, to: Path, name: str, text: str | bytes) -> Path:
    """A copy of a folder in which one file is another."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(folder, to)
    (to / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return to


@FEW
@given(data=st.data())
def test_headers(data: st.DataObject, tmp_path: Path) -> None:
    """What a header says is a tensor of the file, or refused."""
    good = save({"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0, 4, dtype=torch.int64)})
    length = int.from_bytes(good[:8], "little")
    header, rest = json.loads(good[8 : 8 + length]), good[8 + length :]
    entry = header[data.draw(st.sampled_from(["a", "b"]))]
    field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "shape 0", "data_offsets 1", "all"]))
    value = data.draw(st.sampled_from(VALUES + HUGE))
    if field == "all":
        header["a"] = value
    elif " " in field:
        entry[field[:-2]][int(field[-1])] = value
    else:
        entry[field] = value
    text = json.dumps(header).encode()
    file = tmp_path / "file.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + rest)
    answer = refusal(lambda: read_header(str(file)))
    assert answer in ("refused", "accepted")
    if answer == "accepted":
        for stored in read_header(str(file)).values():
            assert all(type(size) is int for size in stored.shape)
            assert torch.empty(stored.shape, device="meta").numel() * stored.dtype.itemsize <= len(rest)


@pytest.mark.parametrize(
    "text",
    [b"", b"5", b"[]", b"null", b'{"a": 5}', b"\xff\xff", b"{", DEEP.encode(), b'{"a": ' + b"9" * 5000],
)
def test_headers_that_are_none(text: bytes, tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    assert refusal(lambda: read_header(str(file))) == "refused"
    assert refusal(lambda: read_header(str(tmp_path))) == "refused"
    assert refusal(lambda: read_header("\0")) == "refused"


OUTSIDE = [
    "../other/model.safetensors",
    "/etc/model.safetensors",
    "a/../../model.safetensors",
    "..",
    "",
    ".",
    "/",
]
OUTSIDE += ["a\0.safetensors", "pytorch_model.bin", 5, None, ["a.safetensors"], {}, 1.5, True]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_leaves_the_folder(name: Any, checkpoint: Path, tmp_path: Path) -> None:
    """Also one whose other entries are right, and a configuration that points elsewhere."""
    index = json.loads((checkpoint / INDEX).read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (tmp_path / "other").mkdir()
    shutil.copy(next(checkpoint.glob("*.safetensors")), tmp_path / "other" / "model.safetensors")
    folder = changed(checkpoint, tmp_path / "model", INDEX, json.dumps(index))
    assert refusal(lambda: find_files(str(folder))) == "refused"
    if name is not None:
        config = json.loads((checkpoint / "config.json").read_text()) | {"transformers_weights": name}
        folder = changed(checkpoint, tmp_path / "model", "config.json", json.dumps(config))
        assert refusal(lambda: opened(folder)) == "refused"


@pytest.mark.parametrize(
    "text", ["", "5", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', DEEP, "\0"]
)
def test_indices_that_are_none(text: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = changed(checkpoint, tmp_path / "model", INDEX, text)
    assert refusal(lambda: find_files(str(folder))) == "refused"


def test_files_in_a_subfolder(checkpoint: Path, tmp_path: Path) -> None:
    """An index may name files below its folder."""
    index = json.loads((checkpoint / INDEX).read_text())
    index["weight_map"] = {key: f"parts/{name}" for key, name in index["weight_map"].items()}
    folder = changed(checkpoint, tmp_path / "model", INDEX, json.dumps(index))
    (folder / "parts").mkdir()
    for file in folder.glob("*.safetensors"):
        file.rename(folder / "parts" / file.name)
    assert opened(folder).expressions.keys() == opened(checkpoint).expressions.keys()


@pytest.mark.parametrize("place", [".", "inner"])
def test_adapters_beside_a_model(place: str, checkpoint: Path, tmp_path: Path) -> None:
    """transformers would put them into the model."""
    shutil.copytree(checkpoint, tmp_path / "model" / place)
    (tmp_path / "model" / place / "adapter_config.json").write_text("{}")
    asked = {"subfolder": "" if place == "." else place}
    with pytest.raises(TpCompileError, match="an adapter beside the model"):
        opened(tmp_path / "model", **asked)
    found = opened(tmp_path / "model", adapter="another", **asked)
    assert found.expressions.keys() == opened(checkpoint).expressions.keys()


@settings(FEW, max_examples=80)
@given(data=st.data())
def test_configurations(data: st.DataObject, checkpoint: Path, tmp_path: Path) -> None:
    """A field of another type: the model is made all the same, or refused."""
    config = json.loads((checkpoint / "config.json").read_text())
    field = data.draw(
        st.sampled_from([*sorted(config), "auto_map", "quantization_config", "_attn_implementation"])
    )
    config[field] = data.draw(st.sampled_from(VALUES))
    folder = changed(checkpoint, tmp_path / "model", "config.json", json.dumps(config))
    assert refusal(lambda: opened(folder)) in ("refused", "accepted")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "5", "[]", "null", "{", DEEP, "\0"])
def test_configurations_that_are_none(name: str, text: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = changed(checkpoint, tmp_path / "model", name, text)
    assert refusal(lambda: opened(folder)) == "refused"

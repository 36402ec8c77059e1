"""Saved programs: the same bits without the model, and whatever is wrong with a folder is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, WatermarkingConfig

from tests.helpers import families
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import artifacts
from tpcompile.runtime.artifacts.generating import generating_data

FRESH = """
import sys, torch, tpcompile
from safetensors.torch import load_file
loaded = tpcompile.load_program(sys.argv[1])
for names in ("tests.on_ranks.artifacts", "tests"):
    assert names not in sys.modules
expected = load_file(sys.argv[1] + "-expected.safetensors")
found = loaded(expected["x"])
assert torch.equal(found["y"], expected["y"]) and torch.equal(found["more"][0], expected["more"])
print("the same")
"""


def test_a_toy_and_what_is_refused(tmp_path: Path) -> None:
    refused = ["it takes x, scale, style", "x is of another type", "records no gradients", "different calls"]
    refused += [
        "was saved for 2 ranks",
        "something else in the folder",
        "writes a buffer that an earlier call has divided",
        "forward changes",
        "in evaluation mode",
    ]
    folder = tmp_path / "program"
    for rank, found in enumerate(run_spmd(artifacts.toy, 2, str(folder))):
        assert found["same"] == [True, True]
        assert found["counted"][0] == found["counted"][1] > 1
        assert f"saved Counted, rank {rank} of 2" in found["text"]
        for text, part in zip(found["refused"], refused, strict=True):
            assert part in text
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    shared |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    command = [sys.executable, "-c", FRESH, str(folder)]
    started = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in started:
        assert process.communicate(timeout=240)[0] == "the same\n"


@pytest.mark.parametrize("name", ["llama"])
def test_a_family_with_its_caches(tmp_path: Path, name: str) -> None:
    for found in run_spmd(artifacts.model_family, 2, name, str(tmp_path / name)):
        assert all(found)


def test_a_saved_program_generates(tmp_path: Path) -> None:
    for found in run_spmd(artifacts.generating, 2, str(tmp_path / "program"), timeout=300):
        assert all(found[way] is True for way in ("dynamic", "static", "beams", "drawn"))
        assert found["bits"] and found["aligned"]  # kernels round by where numbers are in memory
        assert "no program was saved for such a call" in found["another call"]
        assert "different calls of generate" in found["ranks"]
        assert "not a class that generates" in found["class"]
        assert "has no generate" in found["replaced"]
        assert "writes no checkpoint" in found["files"]
        assert "uses its model" in found["modules"]


def test_ranks_whose_caches_differ(tmp_path: Path) -> None:
    assert run_spmd(artifacts.uneven, 3, str(tmp_path / "program")) == [True] * 3


class OwnConfig(LlamaConfig):  # type: ignore[misc]
    """A configuration whose class is somebody's own."""


def test_what_is_kept_for_generating(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = families.build("llama", num_hidden_layers=1)

    def refused() -> str:
        told: str = generating_data(model, LlamaForCausalLM).get("refused", "nothing")
        return told

    model.generation_config.compile_config = CompileConfig()
    model.generation_config.watermarking_config = WatermarkingConfig(bias=3.0)
    model.config.limits = (0.0, float("inf"))
    assert refused() == "nothing"
    model.generation_config.sequence_bias = {(5, 6): 9.0}
    assert "sequence_bias of its GenerationConfig is read otherwise" in refused()
    model.generation_config.sequence_bias = None
    model.config.by_layer = {0: 1}
    assert "by_layer of its LlamaConfig is read otherwise" in refused()
    model.config.by_layer = object()
    assert "its configuration cannot be written" in refused()
    model.config.by_layer = None
    assert refused() == "nothing"
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "_sample", lambda self, *args: None, raising=False)
        assert "not a decoder of transformers' own" in refused()
    model.config = OwnConfig()
    assert "another class, OwnConfig" in refused()


def test_folders_of_others_and_orders_of_calls(tmp_path: Path) -> None:
    for rank, found in enumerate(run_spmd(artifacts.folders, 2, str(tmp_path))):
        assert "something else in the folder" in found["foreign"] and found["kept"] == ["{}", "{}"]
        assert "no room" in found["full"] and "unfinished" in found["unfinished"]
        assert found["same"]
        assert "orders of calls" in found["order"] and "programs alone" in found["parts"]
        for case, is_to in (("one refuses", "is to"), ("one refuses what others run", "was to")):
            told = f"rank 1 {is_to} refuse a call of saved Mlp: no program was saved for such a call"
            assert found[case].startswith("no program was saved") if rank else told in found[case], case
        assert all(found["after"])


def test_replicas(tmp_path: Path) -> None:
    """The first one writes; the other waits until it has, and hears of it if it could not."""
    for waited, full, apart, others in run_spmd(artifacts.replicas, 4, str(tmp_path / "program")):
        assert waited == "accepted"
        assert "no room" in full and "different calls of save_program" in apart
        assert "other models, not replicas" in others and "save_program, up.weight" in others


def test_a_parameter_among_the_arguments(tmp_path: Path) -> None:
    for same, refused in run_spmd(artifacts.parameters, 2, str(tmp_path / "program")):
        assert same and "x is of another type" in refused


def test_programs_of_the_model_as_it_is(tmp_path: Path) -> None:
    for same, said in run_spmd(artifacts.as_it_is, 2, str(tmp_path / "program")):
        assert same == [True] * 3
        assert "different calls of the model as it is now" in said[0] and "was not replaced" in said[1]


def test_a_program_that_asks_for_gradients(tmp_path: Path) -> None:
    for same, said in run_spmd(artifacts.gradients, 2, str(tmp_path / "program")):
        assert same
        assert "under torch.no_grad()" in said[0] and "gradients of other arguments" in said[1]


def test_damaged_and_made_up_folders(tmp_path: Path) -> None:
    for rank, outcomes in enumerate(run_spmd(artifacts.fuzz, 2, str(tmp_path / "program"), str(tmp_path))):
        assert outcomes["refused"] > 40
        assert "accepted" not in outcomes["hostile"], rank


def test_packages_are_native_code_for_the_sizes_that_were_saved(tmp_path: Path) -> None:
    for found in run_spmd(artifacts.packages, 2, str(tmp_path / "program"), timeout=400):
        assert found["packaged"] == 1
        assert found["late"] or found["turns"] > 20  # who waits for another rank does not keep python's lock
        assert found["same"] and found["untouched"]  # other sizes, and who did not ask, run the graph
        assert "saved without packages" in found["without"] and "hands on" in found["refused"]
        assert "draws random numbers" in found["drawn"]

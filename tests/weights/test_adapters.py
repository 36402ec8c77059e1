"""Adapters of PEFT: a sharded model has them, trains, switches, saves and loads them as any other."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import adapters


def test_train_switch_save_load(tmp_path: Path) -> None:
    run_spmd(adapters.train_switch_save_load, 2, str(tmp_path), timeout=400)


def test_trainer(tmp_path: Path) -> None:
    run_spmd(adapters.trainer, 2, str(tmp_path), timeout=400)


def test_prompt_tuning(tmp_path: Path) -> None:
    run_spmd(adapters.prompt_tuning, 2, str(tmp_path), timeout=400)


def test_loaded_around_a_checkpoint(tmp_path: Path) -> None:
    for dora, pissa, number, folder in run_spmd(adapters.loaded, 2, str(tmp_path)):
        assert "follow from weights of the model" in dora and "lora_magnitude_vector" in dora
        assert "changes weights of the model" in pissa
        assert all("cannot be put into the model" in each for each in (number, folder))


def test_added_after_parallelize(tmp_path: Path) -> None:
    run_spmd(adapters.added, 2, str(tmp_path), timeout=400)


def test_added_to_a_packed_projection() -> None:
    run_spmd(adapters.added_to_packed, 2, timeout=400)


def test_refused(tmp_path: Path) -> None:
    answers = run_spmd(adapters.refused, 2, str(tmp_path))
    for rank, (apart, failing, without_values, another, ddp, otherwise, state) in enumerate(answers):
        assert "different weights" in apart and "set the same seed" in apart
        assert ("a positive integer" if rank == 0 else "rank 0 is to change the adapters: outcome") in failing
        assert "a new weight is on meta" in without_values
        assert "is a part already" in another and "up.more" in another
        assert "DistributedDataParallel has its weights" in ddp
        assert "which its programs would not notice" in otherwise
        assert "not saved with state_dict" in state

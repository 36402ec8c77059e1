"""What a model checks of values is checked by its programs, before they hand anything out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tpcompile
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import value_checks


def test_bad_calls_raise(tmp_path: Path) -> None:
    """The sharded model refuses what its python refuses, changes nothing then, and goes on."""
    whole = value_checks.Checks()
    for bad in value_checks.bad_calls().values():
        with pytest.raises((ValueError, RuntimeError)):
            whole(bad)
    for found in run_spmd(value_checks.checks, 2, str(tmp_path / "program")):
        for way in ("model", "saved", "compiled"):
            for said, told in found[way].items():
                assert "a check of the model's forward has failed" in told and said in told, (way, said, told)
            assert found[f"{way} after"]
        assert all('"' not in told for told in found["compiled"].values())  # Inductor puts it into C++
        assert found["calls"] == (3, 2)
        assert "a layer's" in found["layers"]


def test_verify_looks_at_them() -> None:
    report = tpcompile.verify(
        value_checks.Checks().double(), 2, (torch.rand(3, 12, dtype=torch.float64) + 0.1,)
    )
    assert report.ok
    assert len([f for f in report.findings if f.sort == "check"]) >= 3

"""Golden texts: ``pytest --update-golden`` writes what the tests then compare with."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"
# As in the Makefile, and before torch is imported: no look-ups on the hub, no processes that fight for cores.
ALONE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
for variable, value in ALONE.items():
    os.environ.setdefault(variable, value)


def pytest_configure(config: pytest.Config) -> None:
    """Tests neither see the plans that a user has kept, nor leave any there: a run has its own folder."""
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist inherit the environment
        os.environ["TPCOMPILE_CACHE_DIR"] = tempfile.mkdtemp(prefix="tpcompile-plans-")
        os.environ["TPCOMPILE_CACHE"] = "1"


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["TPCOMPILE_CACHE_DIR"], ignore_errors=True)


def pytest_collection_finish() -> None:
    """What is imported stays: python need not look through it for garbage, again and again."""
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the texts in tests/golden")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with ``tests/golden/<name>.txt``."""

    def compare(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            GOLDEN.mkdir(exist_ok=True)
            path.write_text(text.rstrip() + "\n")
        assert path.exists(), f"there is no {path.name} yet: run pytest --update-golden and read it"
        assert text.rstrip() + "\n" == path.read_text(), (
            f"differs from {path.name} (--update-golden rewrites it)"
        )

    return compare

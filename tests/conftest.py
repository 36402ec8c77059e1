"""Golden texts: ``pytest --update-golden`` writes what the tests then compare with."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"

# Tests neither see what a user has captured, nor leave anything there; tests/test_disk_cache.py has its own.
os.environ["TPCOMPILE_CACHE"] = "0"


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

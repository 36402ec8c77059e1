"""The tutorial's code runs, and prints what the pages say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.pages import is_printed, scripts_of
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import pages

DOCS = Path(__file__).resolve().parents[2] / "docs"
TUTORIAL = sorted((DOCS / "tutorial").glob("*.md"))


@pytest.mark.parametrize("page", TUTORIAL, ids=lambda page: page.stem)
def test_the_tutorial_does_what_it_says(page: Path, tmp_path: Path) -> None:
    for script in scripts_of(page):
        printed, *_ = run_spmd(
            pages.printed, script.ranks, script.name, script.pieces, str(tmp_path), timeout=300
        )
        for expected, found in zip(script.prints, printed, strict=True):
            assert is_printed(expected, found), f"expected:\n{expected}\nprinted:\n{found}"

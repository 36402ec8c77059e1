"""The code of the pages runs, and the tutorial's prints what they say."""

from __future__ import annotations

import tempfile
from itertools import groupby
from pathlib import Path

import pytest

from tests.helpers.pages import ALTERNATIVES, APART, NOT_RUN, blocks_of, is_printed, runs_of, scripts_of
from tests.helpers.run_ranks import Workers, run_spmd
from tests.on_ranks import pages

DOCS = Path(__file__).resolve().parents[2] / "docs"
TUTORIAL = sorted((DOCS / "tutorial").glob("*.md"))
PAGES = [page for page in (*sorted(DOCS.glob("*.md")), DOCS.parent / "README.md") if blocks_of(page)]


@pytest.mark.parametrize("page", TUTORIAL, ids=lambda page: page.stem)
def test_the_tutorial_does_what_it_says(page: Path, tmp_path: Path) -> None:
    for script in scripts_of(page):
        printed, *_ = run_spmd(
            pages.printed, script.ranks, script.name, script.pieces, str(tmp_path), timeout=300
        )
        for expected, found in zip(script.prints, printed, strict=True):
            assert is_printed(expected, found), f"expected:\n{expected}\nprinted:\n{found}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page: Path, tmp_path: Path) -> None:
    """In fresh processes: pages register rules and strategies."""
    runs = sorted(runs_of(page), key=lambda run: run.ranks)
    for ranks, together in groupby(runs, lambda run: run.ranks):
        workers = Workers(ranks)
        try:
            for run in together:
                workers.run(pages.blocks_run, run, tempfile.mkdtemp(dir=tmp_path), timeout=300)
        finally:
            workers.close()


def test_tables_name_blocks_that_are_there() -> None:
    names = [block.name for page in PAGES for block in blocks_of(page)]
    tables = [*NOT_RUN, *APART, *ALTERNATIVES]
    assert sorted(tables) == sorted(set(tables) & set(names))
    assert all(names.count(name) == 1 for name in tables), "a name that two blocks have"

"""The table of what works and what is refused, in ``docs/sharded_modules.md``, is what happens."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import situations

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sharded_modules.md"
_ROW = re.compile(r"^\| (.+) \| (works|refused) \| (.*) \|$", re.MULTILINE)


def test_the_table_is_true() -> None:
    """Every row is a case and every case a row, and each ends on all ranks as its row says."""
    rows = {what: (verdict, instead) for what, verdict, instead in _ROW.findall(PAGE.read_text())}
    assert rows.keys() == situations.CASES.keys()
    assert all(instead for verdict, instead in rows.values() if verdict == "refused")
    for found in run_spmd(situations.verdicts, 2, timeout=300):
        assert found == {what: verdict for what, (verdict, _) in rows.items()}

"""Modules that are waited for: looked for in between, failing at first, imported while two wait."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

from tpcompile.ir.when_imported import when_imported


def test_a_module_that_was_looked_for_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "awaited.py").write_text("raise RuntimeError")
    seen: list[str] = []
    before = list(sys.meta_path)
    when_imported("awaited", lambda module: seen.append(f"first {module.value}"))
    when_imported("awaited", lambda module: seen.append(f"second {module.value}"))
    assert importlib.util.find_spec("awaited") is not None
    with pytest.raises(RuntimeError):
        importlib.import_module("awaited")
    assert not seen
    (tmp_path / "awaited.py").write_text("value = 1\n\n\n")
    importlib.invalidate_caches()
    importlib.import_module("awaited")
    assert sorted(seen) == ["first 1", "second 1"] and sys.meta_path == before
    when_imported("awaited", lambda module: seen.append("now"))
    assert seen[-1] == "now"
    del sys.modules["awaited"]

"""The documentation as a site: no broken link, no dead name, every public name in the reference."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import tpcompile

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])


def test_the_site_is_built(tmp_path: Path) -> None:
    """Strict: a link that leads nowhere is an error, and so is a page that no menu has."""
    pytest.importorskip("mkdocs", reason="in a checkout's own set-up it is there")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "custom_op" in (tmp_path / "examples" / "custom_rule" / "index.html").read_text()


def test_the_reference_has_every_public_name() -> None:
    listed = re.findall(r"^::: tpcompile\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.M)
    assert sorted(listed) == sorted(tpcompile.__all__) == dir(tpcompile)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_exist(page: Path) -> None:
    """``tpcompile.a.b`` in a page is a module, or something in one."""
    dead = []
    for name in sorted(set(re.findall(r"(?<![\w/.-])tpcompile((?:\.[A-Za-z]\w*)+)", page.read_text()))):
        found: object = tpcompile
        path = "tpcompile"
        for part in name.split(".")[1:]:
            path = f"{path}.{part}"
            found = getattr(found, part, None) or _module(path)
            if found is None:
                dead.append(path)
                break
    assert not dead


def _module(path: str) -> object:
    try:
        return import_module(path)
    except ModuleNotFoundError:
        return None


def test_files_exist_that_the_top_pages_link_to() -> None:
    """Those that are not in the site, of which mkdocs knows nothing."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
        assert not [link for link in links if not (ROOT / link).exists()], page.name

"""The wheel holds every subpackage, nothing at top level but tpcompile, and works outside the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {"tpcompile": "tpcompile", "passes": "tpcompile/passes", "lowering": "tpcompile/lowering"}
"""Folders of the checkout, and where a wheel has them."""


def _run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel from a copy of the sources: a build in the checkout would leave files, and reuse old ones."""
    pytest.importorskip("setuptools")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.cfg", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel")
    _run(*pip, "--no-build-isolation", "--no-deps", "--no-index", "-w", target, source, cwd=target)
    (built,) = target.glob("*.whl")
    return built


def test_wheel_holds_every_module_and_only_tpcompile(wheel: Path) -> None:
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in SOURCES.items()
        for path in (ROOT / folder).rglob("*.py")
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}
    assert {name for name in names if name.endswith(".py")} == expected
    data = {"tpcompile/py.typed", *(f"tpcompile/planner/report/report.{kind}" for kind in ("css", "js"))}
    assert {name for name in names if name.startswith("tpcompile/")} == expected | data
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"tpcompile"}


def test_installed_wheel_imports_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    # A user's own packages of these names must neither disturb ours nor be disturbed.
    for name in ("passes", "lowering"):
        (elsewhere / name).mkdir()
        (elsewhere / name / "__init__.py").write_text("mine = True\n")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install")
    _run(*pip, "--no-deps", "--no-index", "--target", site, wheel, cwd=elsewhere)
    program = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import tpcompile, tpcompile.passes, tpcompile.lowering\n"
        "import passes, lowering\n"
        "assert passes.mine and lowering.mine\n"
        "assert tpcompile.__version__\n"
        "for module in (tpcompile, tpcompile.passes, tpcompile.lowering): print(module.__file__)\n"
    )
    files = _run(sys.executable, "-c", program, cwd=elsewhere).split()
    assert [Path(file) for file in files] == [
        site / "tpcompile" / "__init__.py",
        site / "tpcompile" / "passes" / "__init__.py",
        site / "tpcompile" / "lowering" / "__init__.py",
    ]


def test_bare_checkout_imports() -> None:
    """Without an install, from the root, and not under the folders' own names."""
    program = (
        "import tpcompile.passes, tpcompile.lowering\n"
        "for name in ('passes', 'lowering'):\n"
        "    try: __import__(name)\n"
        "    except ImportError as error: print('tpcompile.' + name in str(error))\n"
    )
    assert _run(sys.executable, "-c", program, cwd=ROOT).split() == ["True", "True"]

"""Entries on disk: written whole or not at all, and never trusted blindly."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.helpers.run_ranks import run_spmd
from tpcompile.planner import disk_cache
from tpcompile.planner.disk_cache import read_entry, write_entry

NAME, OTHER = "test-" + 64 * "0", "test-" + 64 * "1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that is on."""
    path = tmp_path / "cache"
    monkeypatch.setenv("TPCOMPILE_CACHE", "1")
    monkeypatch.setenv("TPCOMPILE_CACHE_DIR", str(path))
    return path


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What is logged as a warning (pytest's own log capture is off)."""
    said: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler = Keep(logging.WARNING)
    logging.getLogger("tpcompile").addHandler(handler)
    yield said
    logging.getLogger("tpcompile").removeHandler(handler)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def expose(path: Path) -> None:
    path.chmod(0o644)


def take_another(path: Path) -> None:
    write_entry(OTHER, b"another")
    (path.parent / OTHER).rename(path)


@pytest.mark.parametrize("spoil", [damage, truncate, expose, take_another])
def test_a_bad_entry_is_ignored_and_rewritten(
    folder: Path, spoil: Callable[[Path], None], warnings: list[str]
) -> None:
    write_entry(NAME, b"what was decided")
    assert [path.stat().st_mode & 0o777 for path in (folder, folder / NAME)] == [0o700, 0o600]
    spoil(folder / NAME)
    assert read_entry(NAME) is None
    assert len(warnings) == 1 and "is ignored" in warnings[0]
    write_entry(NAME, b"what was decided")
    assert read_entry(NAME) == b"what was decided"


def test_files_of_others_are_not_read(folder: Path, warnings: list[str]) -> None:
    write_entry(NAME, b"ours")
    assert read_entry(NAME) == b"ours"
    (folder / NAME).rename(folder / "elsewhere")
    (folder / NAME).symlink_to(folder / "elsewhere")
    assert read_entry(NAME) is None
    (folder / NAME).unlink()
    (folder / NAME).mkdir()
    assert read_entry(NAME) is None
    write_entry(NAME, b"ours")  # it cannot take the place of a folder
    assert len(warnings) == 3
    (folder / NAME).rmdir()
    if os.geteuid() == 0:
        write_entry(NAME, b"ours")
        os.chown(folder / NAME, 12345, -1)
        assert read_entry(NAME) is None
        assert "another user" in warnings[-1]
        write_entry(NAME, b"ours")
        assert read_entry(NAME) == b"ours"
    folder.chmod(0o777)
    assert read_entry(NAME) is None
    assert "others can write" in warnings[-1]


def test_a_folder_that_cannot_be_is_no_error(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TPCOMPILE_CACHE", "1")
    monkeypatch.setenv("TPCOMPILE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    write_entry(NAME, b"ours")
    assert read_entry(NAME) is None
    assert warnings


def test_the_oldest_are_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"test-{number:064x}" for number in range(6)]
    monkeypatch.setattr(disk_cache, "MOST_ENTRIES", 3)
    folder.mkdir(mode=0o700)
    (folder / "of the user").write_text("not ours")
    (folder / ".tpcompile-part-old").write_text("")
    os.utime(folder / ".tpcompile-part-old", (0, 0))
    for number, name in enumerate(names[:4]):
        write_entry(name, b"x")
        os.utime(folder / name, (1000 + number, 1000 + number))
    assert sorted(p.name for p in folder.iterdir()) == ["of the user", *names[1:4]]
    assert read_entry(names[1])  # used, hence young again
    write_entry(names[4], b"x")
    assert sorted(p.name for p in folder.iterdir()) == ["of the user", names[1], names[3], names[4]]
    monkeypatch.setattr(disk_cache, "MOST_BYTES", 450)
    write_entry(names[5], 300 * b"x")
    assert [p.name for p in folder.iterdir() if p.name.startswith("test")] == [names[5]]
    write_entry(names[0], 501 * b"x")
    assert not (folder / names[0]).exists()


def write_often(path: str) -> int:
    """On a rank: writes and reads one entry as fast as it can; how often it read something whole."""
    with patch.dict(os.environ, TPCOMPILE_CACHE="1", TPCOMPILE_CACHE_DIR=path):
        found = []
        for number in range(200):
            write_entry(NAME, bytes([number]) * 50_000)
            found.append(read_entry(NAME))
    return sum(f is not None and len(f) == 50_000 and len(set(f)) == 1 for f in found)


def test_entries_are_written_whole(folder: Path) -> None:
    assert run_spmd(write_often, 2, str(folder)) == [200, 200]


def test_other_tests_use_a_folder_of_this_run() -> None:
    folder = disk_cache.cache_folder()
    assert folder is not None and folder.name.startswith("tpcompile-plans-")
    assert run_spmd(disk_cache.cache_folder, 2) == [folder, folder]


def test_what_is_kept_goes_with_every_module_of_the_compiler() -> None:
    """A plan, and the version of the rules, would otherwise outlive what they follow from."""
    root = Path(__file__).parents[2]
    folders = map(root.joinpath, ("tpcompile", "passes", "lowering"))
    every = {path.resolve() for folder in folders for path in folder.rglob("*.py")}
    assert {path.resolve() for path in disk_cache.own_files(root / "tpcompile").values()} == every


def test_what_is_kept_goes_with_contents_wherever_they_are(tmp_path: Path) -> None:
    """A checkout, a wheel, another folder: ranks compare this, and may have any of them."""
    hashes = []
    for name, beside in (("checkout", ""), ("wheel", "tpcompile"), ("other", "")):
        for module in (
            "tpcompile/api",
            "tpcompile/ir/nodes",
            f"{beside}/passes/one",
            f"{beside}/lowering/two",
        ):
            path = tmp_path / name / f"{module.lstrip('/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{path.name} {name == 'other' and path.stem == 'two'}")
        hashes.append(disk_cache.hash_of(disk_cache.own_files(tmp_path / name / "tpcompile")))
    assert hashes[0] == hashes[1] != hashes[2]

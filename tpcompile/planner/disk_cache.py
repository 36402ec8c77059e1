"""Entries on disk that survive a restart: written whole or not at all, and never trusted blindly.

Where: ``$TPCOMPILE_CACHE_DIR``, by default ``~/.cache/tpcompile``. ``TPCOMPILE_CACHE=0`` switches it off.
A cache may only ever save time: whatever is wrong with it is logged, and the work is done anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)

MOST_ENTRIES = 256
MOST_BYTES = 1 << 28
_MAGIC = b"tpcompile entry 2\n"
_PART = ".tpcompile-part-"
_NAME = re.compile(r"[a-z]+-[0-9a-f]{64}")
_ABANDONED = 3600.0
"""Seconds after which a file that is still being written belongs to a process that died."""


def cache_folder() -> Path | None:
    """The folder of the cache, made if it is not there; None if the cache is off or cannot be used safely."""
    if os.environ.get("TPCOMPILE_CACHE", "1").lower() in ("0", "off", "false", "no"):
        return None
    given = os.environ.get("TPCOMPILE_CACHE_DIR")
    try:
        folder = Path(given) if given else Path.home() / ".cache" / "tpcompile"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        log.warning("no cache: %s", error)
        return None
    # Who can put an entry here decides how this user's models are divided.
    if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        log.warning(
            "the cache %s is not used: others can write to it (chmod 700 helps if it is yours)", folder
        )
        return None
    return folder


def entry_name(*facts: object) -> str:
    """The name of a plan that depends on nothing but these facts (of which the representation counts)."""
    return f"plan-{hashlib.sha256(repr(facts).encode()).hexdigest()}"


@functools.cache
def own_sources() -> str:
    """The hash of all of tpcompile's files: hardly one has no say in a plan."""
    return hash_of(own_files(Path(__file__).parents[1]))


def hash_of(files: Mapping[str, Path]) -> str:
    """The hash of some files and of their names, wherever they are: ranks may have other folders."""
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def own_files(package: Path) -> dict[str, Path]:
    """All of tpcompile's modules, as they are named inside of it; a checkout has some packages beside it."""
    beside = [package.parent / name for name in ("passes", "lowering") if not (package / name).is_dir()]
    return {
        path.relative_to(root).as_posix(): path
        for folder, root in ((package, package), *((each, package.parent) for each in beside))
        for path in folder.rglob("*.py")
    }


def entries() -> list[Path]:
    """The files of all entries, the one that was used last first; none if there is no cache."""
    folder = cache_folder()
    found = () if folder is None else (path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    return sorted(found, key=lambda path: path.lstat().st_mtime, reverse=True)


def read_entry(name: str) -> bytes | None:
    """What was stored under a name; None if there is nothing, or nothing that can be trusted."""
    folder = cache_folder()
    if folder is None:
        return None
    try:
        whole = _read_own_file(folder / name)
        payload = _open_envelope(name, whole)
        os.utime(folder / name)  # it is the oldest that are removed
        return payload
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        log.warning("the cache entry %s is ignored: %s", folder / name, error)
        return None


def write_entry(name: str, payload: bytes) -> None:
    """Stores an entry instead of the one of that name; others see the old one, or the new one."""
    folder = cache_folder()
    if folder is None or len(payload) > MOST_BYTES:
        return
    part: str | None = None
    try:
        descriptor, part = tempfile.mkstemp(prefix=_PART, dir=folder)  # its mode is 0600
        with open(descriptor, "wb") as file:
            file.write(_MAGIC + _seal(name, payload) + b"\n" + payload)
        os.replace(part, folder / name)
        part = None
        _remove_oldest(folder)
    except OSError as error:
        log.warning("the cache %s cannot be written: %s", folder, error)
    finally:
        if part is not None:
            with contextlib.suppress(OSError):
                os.unlink(part)


def _read_own_file(path: Path) -> bytes:
    """A file's contents.

    Raises:
        OSError: it cannot be read.
        ValueError: somebody else may have written it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is not a file")
        if found.st_uid != os.geteuid():
            raise ValueError("it belongs to another user")
        if found.st_mode & 0o077:
            raise ValueError("others have access to it")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def _seal(name: str, payload: bytes) -> bytes:
    """Binds an entry to its name, so that a renamed one is not taken for another."""
    return hashlib.sha256(f"{name}\n".encode() + payload).hexdigest().encode()


def _open_envelope(name: str, whole: bytes) -> bytes:
    size = len(_MAGIC) + 64 + 1
    seal, payload = whole[len(_MAGIC) : size - 1], whole[size:]
    if not whole.startswith(_MAGIC) or seal != _seal(name, payload):
        raise ValueError("it is damaged, or belongs to another name")
    return payload


def _remove_oldest(folder: Path) -> None:
    """Keeps the cache within its bounds; other processes may do the same, and other files are not ours."""
    entries: list[tuple[float, int, Path]] = []
    now = time.time()
    for path in folder.iterdir():
        try:
            found = path.lstat()
        except OSError:
            continue
        if not stat.S_ISREG(found.st_mode):
            continue
        if _NAME.fullmatch(path.name):
            entries.append((found.st_mtime, found.st_size, path))
        elif path.name.startswith(_PART) and now - found.st_mtime > _ABANDONED:
            path.unlink(missing_ok=True)
    entries.sort(reverse=True)
    total = 0
    for number, (_, size, path) in enumerate(entries):
        total += size
        if number >= MOST_ENTRIES or total > MOST_BYTES:
            path.unlink(missing_ok=True)

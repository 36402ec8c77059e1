"""Puts a finished folder in the place of another one, so that at any time one of them is there as a whole."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.ENOTSUP}


def replace_folder(new: Path, old: Path, obsolete: Callable[[str], bool]) -> None:
    """Replaces a folder; what else lies in it stays.

    Args:
        new: the finished folder, beside the other; it is gone afterwards.
        old: the folder to replace; there may be none.
        obsolete: whether a file of the old folder is to go.

    Raises:
        OSError: it cannot be replaced; the old folder is as it was.
    """
    if not old.exists():
        os.rename(new, old)
        return
    written = set(os.listdir(new))
    others = [entry for entry in os.scandir(old) if entry.name not in written and not obsolete(entry.name)]
    for entry in others:
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), new / entry.name)
        elif entry.is_file():
            _link(entry.path, str(new / entry.name))
    shutil.copymode(old, new)
    replaced = _exchange(new, old)
    for entry in others:
        if entry.is_dir(follow_symlinks=False):
            os.rename(replaced / entry.name, old / entry.name)
    shutil.rmtree(replaced)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # not every file system has links
        shutil.copy2(source, target)


def _exchange(new: Path, old: Path) -> Path:
    """Exchanges two folders, at once where the system can; returns where the old one is."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None:
        paths = os.fsencode(new), os.fsencode(old)
        if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
            return new
        number = ctypes.get_errno()
        if number not in _CANNOT:
            raise OSError(number, os.strerror(number), str(old))
    aside = new.with_name(new.name + "-replaced")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise
    return aside

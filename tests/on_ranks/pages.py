"""What ranks do in ``test_pages``: a script of a page of the documentation."""

from __future__ import annotations

import contextlib
import io
import linecache
import sys
from types import ModuleType
from unittest import mock


def printed(name: str, pieces: list[str], folder: str) -> list[str]:
    """Runs the pieces of a script one after another, in a folder; what each prints."""
    module = ModuleType("__main__")
    found = []
    with contextlib.chdir(folder), mock.patch.dict(sys.modules, {"__main__": module}):
        for number, piece in enumerate(pieces):
            out, file = io.StringIO(), f"{folder}/{name}-{number}"
            linecache.cache[file] = (len(piece), None, piece.splitlines(keepends=True), file)
            with contextlib.redirect_stdout(out):
                exec(compile(piece, file, "exec"), module.__dict__)
            found.append(out.getvalue())
    return found

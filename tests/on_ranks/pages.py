"""What ranks do in ``test_pages``: a script of a page of the documentation."""

from __future__ import annotations

import contextlib
import io
import linecache
import sys
from collections.abc import Iterator
from types import ModuleType


def printed(name: str, pieces: list[str], folder: str) -> list[str]:
    """Runs the pieces of a script one after another, in a folder; what each prints."""
    module = ModuleType("__main__")
    found = []
    with contextlib.chdir(folder), _as_main(module):
        for number, piece in enumerate(pieces):
            out, file = io.StringIO(), f"{folder}/{name}-{number}"
            linecache.cache[file] = (len(piece), None, piece.splitlines(keepends=True), file)
            with contextlib.redirect_stdout(out):
                exec(compile(piece, file, "exec"), module.__dict__)
            found.append(out.getvalue())
    return found


@contextlib.contextmanager
def _as_main(module: ModuleType) -> Iterator[None]:
    """Functions that are looked for by their module's name are found; what is imported meanwhile stays."""
    before = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        yield
    finally:
        sys.modules["__main__"] = before

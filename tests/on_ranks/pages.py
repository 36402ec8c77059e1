"""What ranks do in ``test_pages``: a script of a page of the documentation, or its blocks."""

from __future__ import annotations

import contextlib
import io
import linecache
import sys
from collections.abc import Iterator
from types import ModuleType

from tests.helpers.pages import Run
from tests.helpers.run_ranks import as_torchrun
from tests.on_ranks.page_names import names_of


def printed(name: str, pieces: list[str], folder: str) -> list[str]:
    """Runs the pieces of a script one after another, in a folder; what each prints."""
    module = ModuleType("__main__")
    found = []
    with contextlib.chdir(folder), _as_main(module):
        for number, piece in enumerate(pieces):
            out, file = io.StringIO(), f"{folder}/{name}-{number}"
            with contextlib.redirect_stdout(out):
                _run(piece, file, module)
            found.append(out.getvalue())
    return found


def blocks_run(run: Run, folder: str) -> None:
    """Runs blocks of a page one after another, in a folder, over one set of names."""
    module = ModuleType("__main__")
    with contextlib.chdir(folder), as_torchrun(), _as_main(module), contextlib.redirect_stdout(io.StringIO()):
        module.__dict__.update(names_of(run.names))
        for block in run.blocks:
            _run(block.code, f"{block.page}.md:{block.line}", module)


def _run(code: str, file: str, module: ModuleType) -> None:
    """Runs some code in a module; errors, and tracing, find its lines."""
    linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)
    exec(compile(code, file, "exec"), module.__dict__)


@contextlib.contextmanager
def _as_main(module: ModuleType) -> Iterator[None]:
    """Functions that are looked for by their module's name are found; what is imported meanwhile stays."""
    before = sys.modules["__main__"]
    sys.modules["__main__"] = module
    try:
        yield
    finally:
        sys.modules["__main__"] = before

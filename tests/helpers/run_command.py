"""A command as a process, which is forked from the server that ranks come from: torch is there already."""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .run_ranks import forkserver


@dataclass(frozen=True)
class Ended:
    """How a process has ended: its exit code, and what it has written."""

    exit_code: int | None
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """All that it has written."""
        return self.stdout + self.stderr


def run_command(*arguments: str, timeout: float = 300.0) -> Ended:
    """Runs ``python -m tpcompile`` with these arguments."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("TPCOMPILE_")}
    with tempfile.TemporaryDirectory() as folder:
        written = [f"{folder}/stdout", f"{folder}/stderr"]
        with forkserver() as context:
            process = context.Process(target=_main, args=(arguments, written, kept))
            process.start()
        process.join(timeout)
        process.kill()
        process.join()
        return Ended(process.exitcode, *(Path(path).read_text() for path in written))


def _main(arguments: Sequence[str], written: Sequence[str], environment: Mapping[str, str]) -> None:
    for number, path in enumerate(written, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(environment)
    sys.argv = ["tpcompile", *arguments]
    runpy.run_module("tpcompile", run_name="__main__", alter_sys=True)

"""The runner that applies a list of passes."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from tpcompile.errors import TpCompileError
from tpcompile.planner.global_program import GlobalProgram, Pass

from .verify_graph import verify_graph

log = logging.getLogger("tpcompile.passes")


def run_passes(program: GlobalProgram, passes: Sequence[Pass]) -> None:
    """Applies passes in order; the graph is verified before the first and after each.

    With ``TPCOMPILE_LOGS=<directory>`` the graph is written there before and after every pass that
    changed it, numbered, with the change in the number of calls.

    Raises:
        TpCompileError: a pass left an invalid graph, or changed it and says that it did not; the error
            names it and those before it. Other errors of a pass get that as a note.
    """
    verify_graph(program, "capture")
    done: list[str] = []
    for one in passes:
        before, start = program.call_count(), time.perf_counter()
        done.append(one.name)
        try:
            changed = one.apply(program)
        except Exception as error:
            error.add_note(f"in the last of these passes: {' -> '.join(done)}")
            raise
        after = program.call_count()
        if changed:
            verify_graph(program, " -> ".join(done))
        elif after != before:
            raise TpCompileError(
                f"the pass {one.name} says that it changed nothing",
                where=f"pass {one.name}",
                todo="return True",
            )
        log.info("%-28s %+5d calls  %.3f s", one.name, after - before, time.perf_counter() - start)
        if changed:
            _dump(program, f"{program.serial():02d}-{one.name}", after - before)


def _dump(program: GlobalProgram, name: str, difference: int) -> None:
    folder = os.environ.get("TPCOMPILE_LOGS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, f"{name}.txt").write_text(f"# {name}: {difference:+d} calls\n{program.text()}\n")

"""The scripts that stand in a page of the documentation, piece by piece, with what each piece prints.

A block of python whose first line is ``# name.py`` begins a script, the blocks behind it go on with it. The
line ``$ python name.py`` or ``$ torchrun --nproc-per-node 2 name.py`` runs what has come since the last such
line, and a block of text right behind it is what that prints; ``[...]`` stands for anything.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from doctest import ELLIPSIS, OutputChecker
from pathlib import Path

_PARTS = re.compile(
    r"^```python\n(?P<code>.*?)^```$|^    \$ (?P<run>[^\n]+)$(?:\n+```text\n(?P<text>.*?)^```$)?", re.M | re.S
)


@dataclass
class Script:
    """One script of a page: the ranks that it runs on, its pieces of python, and what each prints."""

    name: str
    ranks: int = 1
    pieces: list[str] = field(default_factory=list)
    prints: list[str] = field(default_factory=list)


def scripts_of(page: Path) -> list[Script]:
    """All scripts of a page, in order."""
    scripts: list[Script] = []
    code = ""
    for part in _PARTS.finditer(page.read_text()):
        if part["code"] is not None:
            code += part["code"]
            continue
        if begins := re.match(r"# (\w+\.py)\n", code):
            scripts.append(Script(begins[1]))
        script = scripts[-1]
        assert part["run"].split()[-1] == script.name, (
            f"{page.name}: {part['run']} does not run {script.name}"
        )
        ranks = re.match(r"torchrun --nproc-per-node (\d+) ", part["run"])
        script.ranks = int(ranks[1]) if ranks else 1
        script.pieces.append(code)
        script.prints.append(part["text"] or "")
        code = ""
    assert not code, f"{page.name}: its last block of python is never run"
    return scripts


def is_printed(expected: str, printed: str) -> bool:
    """Whether a page's block of text is what was printed."""
    return OutputChecker().check_output(expected.replace("[...]", "..."), printed, ELLIPSIS)

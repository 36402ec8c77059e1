"""The code that stands in pages of the documentation.

The tutorial's pages hold scripts, which are run piece by piece, with what each piece prints.

A block of python whose first line is ``# name.py`` begins a script, the blocks behind it go on with it. The
line ``$ python name.py`` or ``$ torchrun --nproc-per-node 2 name.py`` runs what has come since the last such
line, and a block of text right behind it is what that prints; ``[...]`` stands for anything.

Other pages have blocks of python, which take names for granted (``tests/on_ranks/page_names.py``).
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from doctest import ELLIPSIS, OutputChecker
from pathlib import Path

_PARTS = re.compile(
    r"^```python\n(?P<code>.*?)^```$|^    \$ (?P<run>[^\n]+)$(?:\n+```text\n(?P<text>.*?)^```$)?", re.M | re.S
)
_BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```$", re.M | re.S)


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


Name = tuple[str, str]
"""A page, and the first line of a block of python in it."""

NOT_RUN: dict[Name, str] = {
    ("README", "# capture first: model.capture(...) or example arguments"): (
        "compiles C++; examples/compile_and_train_step.py, which a test runs, does the same"
    ),
    ("adding_a_pass", '"square_by_multiplying_norms": Case('): "a line of a table in a test",
    ("models", "model = tpcompile.from_pretrained(path, mesh)  # planned by a call of input_ids"): (
        "takes a minute and a half on one rank; tests/whole/test_encoder_decoder.py calls Qwen2-VL so"
    ),
}
"""The blocks that do not run, and why."""

APART: dict[Name, tuple[int, str]] = {
    ("README", "tpcompile.parallelize(model, mesh, example_args=(words, style))"): (1, "artifacts"),
    ("loading", "from transformers import FineGrainedFP8Config"): (1, "fp8"),
    ("quantised", 'model = tpcompile.from_pretrained("path/or/name", keep_quantised=True)'): (1, "fp8"),
    ("sharded_modules", 'mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))'): (
        4,
        "replicas",
    ),
    ("sharded_modules", 'mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "tensor"))'): (
        4,
        "pipeline",
    ),
    ("sequence_parallel", 'plan = {"model.layers.*.input_layernorm": "sequence_parallel"}'): (1, "llama"),
    ("strategies", "rules = tpcompile.to_hf_plan(tpcompile.plan(model, 2))"): (2, "to_transformers"),
    ("trainer", 'mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))'): (4, "trainer"),
    ("trainer", "# before it is sharded"): (1, "trainer"),
    ("verify", "# on every rank, with the same call"): (1, "sharded"),
}
"""The blocks that take other names for granted than the page before them: on how many ranks they run, and
which names of ``tests/on_ranks/page_names.py`` they find."""

ALTERNATIVES: set[Name] = {
    ("README", 'tpcompile.parallelize(model, plan="hf")  # or "hf-ep": whole experts on each rank'),
    ("compile", "model = tpcompile.parallelize(model, mesh, compile=True)"),
    ("strategies", 'tpcompile.parallelize(model, plan="hf")  # the model\'s own plan'),
}
"""The blocks of which each statement is another way to do the same, with what the page takes for granted."""


@dataclass(frozen=True)
class Block:
    """A block of python of a page.

    Attributes:
        page: the page's name, without its ending.
        line: where in the page its first line stands.
        code: its lines.
    """

    page: str
    line: int
    code: str

    @property
    def name(self) -> Name:
        """By which tables name it."""
        return self.page, self.code.partition("\n")[0]


@dataclass
class Run:
    """What runs in processes of its own.

    Attributes:
        ranks: how many.
        names: which names it finds: those of ``tests/on_ranks/page_names.py`` for a page, or of `APART`.
        blocks: what runs, in order.
    """

    ranks: int
    names: str
    blocks: list[Block]


def blocks_of(page: Path) -> list[Block]:
    """All blocks of python of a page, in order."""
    text = page.read_text()
    found = [
        Block(page.stem, text.count("\n", 0, each.start("code")) + 1, each["code"])
        for each in _BLOCK.finditer(text)
    ]
    assert len(found) == len(re.findall(r"^\s*```py", text, re.M)), (
        f"{page.name} has python that is not found"
    )
    return found


def runs_of(page: Path) -> list[Run]:
    """What of a page runs: the blocks of the page together, and by themselves those that are apart."""
    together = Run(1, page.stem, [])
    runs = [together]
    for block in blocks_of(page):
        if block.name in NOT_RUN:
            continue
        if block.name in APART:
            runs.append(Run(*APART[block.name], [block]))
        elif block.name in ALTERNATIVES:
            for each in ast.parse(block.code).body:
                line, code = block.line + each.lineno - 1, ast.unparse(each)
                runs.append(Run(1, page.stem, [Block(page.stem, line, code)]))
        else:
            together.blocks.append(block)
    return [run for run in runs if run.blocks]

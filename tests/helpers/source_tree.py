"""The package's own source files, and what they import from one another."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"tpcompile": "tpcompile", "passes": "tpcompile.passes", "lowering": "tpcompile.lowering"}


def _modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = _modules()
"""Every module of the package, by the name under which it is imported."""


@cache
def parsed(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(path.read_text())


def imported_by(path: Path, package: Sequence[str] = ()) -> Iterator[str]:
    """The full names that a file of a package imports, wherever in it: `from a import b` yields `a.b`."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - (node.level - 1)] if node.level else ()
            base = ".".join((*parents, *([node.module] if node.module else [])))
            yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def imported_names(module: str) -> frozenset[str]:
    """The full names that a module of the package imports."""
    path, parts = MODULES[module], module.split(".")
    return frozenset(imported_by(path, parts if path.name == "__init__.py" else parts[:-1]))


def imports() -> set[tuple[str, str]]:
    """Pairs of modules of which the first imports the second, or a name of it."""
    found = set()
    for module in MODULES:
        for name in imported_names(module):
            imported = name if name in MODULES else name.rpartition(".")[0]
            if imported in MODULES and imported != module:
                found.add((module, imported))
    return found

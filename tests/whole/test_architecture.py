"""Who may import whom, and other rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"tpcompile": "tpcompile", "passes": "tpcompile.passes", "lowering": "tpcompile.lowering"}

# Types of models that are also ordinary words, which a compiler may well say.
ORDINARY_WORDS = {"align", "beam", "bit", "clip", "funnel", "git", "led", "radio", "rag", "sam"}


def _modules() -> dict[str, Path]:
    """Every module of the package, by the name under which it is imported."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = _modules()


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _imports(module: str) -> Iterator[str]:
    """The full names that a module imports, wherever in it: `from a import b` yields `a` and `a.b`."""
    path = MODULES[module]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                parents = parents[: len(parents) - (node.level - 1)]
                base = ".".join(parents + ([base] if base else []))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("tpcompile.passes", "tpcompile.lowering"),
        ("tpcompile.rules", "tpcompile.planner"),
        ("tpcompile.rules", "tpcompile.lowering"),
    ],
)
def test_never_imports(importer: str, imported: str) -> None:
    found = {
        (module, name)
        for module in MODULES
        if _within(module, importer)
        for name in _imports(module)
        if _within(name, imported)
    }
    assert not found


def test_nothing_imports_the_checkout_folders() -> None:
    """`import passes` works in a checkout only by accident, and is another module than `tpcompile.passes`."""
    found = {
        (module, name)
        for module in MODULES
        for name in _imports(module)
        if _within(name, "passes") or _within(name, "lowering")
    }
    assert not found


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _pass_classes() -> dict[str, tuple[Path, ast.ClassDef]]:
    """The classes in passes/ that derive from `Pass`, directly or through one another."""
    classes = {
        node.name: (path, node)
        for path in sorted((ROOT / "passes").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    passes = {"Pass"}
    while True:
        more = {
            name
            for name, (_, node) in classes.items()
            if any(ast.unparse(base).split("[")[0].split(".")[-1] in passes for base in node.bases)
        }
        if more <= passes:
            return {name: classes[name] for name in sorted(passes - {"Pass"})}
        passes |= more


def test_a_pass_is_a_file_of_its_name() -> None:
    wrong = {name: path.name for name, (path, _) in _pass_classes().items() if path.stem != _snake_case(name)}
    assert not wrong


def test_the_name_of_a_pass_is_its_class_name() -> None:
    wrong = {}
    for class_name, (_, node) in _pass_classes().items():
        for statement in node.body:
            if isinstance(statement, ast.Assign):
                targets: list[ast.expr] = statement.targets
            elif isinstance(statement, ast.AnnAssign):
                targets = [statement.target]
            else:
                continue
            is_name = any(isinstance(target, ast.Name) and target.id == "name" for target in targets)
            if is_name and isinstance(statement.value, ast.Constant):
                if statement.value.value != _snake_case(class_name).replace("_", "-"):
                    wrong[class_name] = statement.value.value
    assert not wrong


def _strings(tree: ast.AST) -> Iterator[ast.Constant]:
    """The string literals of a module that are not docstrings."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node


def test_no_module_knows_a_type_of_model() -> None:
    """Rules are about operators: a model's name in the compiler is a special case in disguise."""
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.value!r}"
        for path in MODULES.values()
        for node in _strings(ast.parse(path.read_text()))
        if node.value in CONFIG_MAPPING_NAMES.keys() - ORDINARY_WORDS
    ]
    assert not found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("SplitPackedMatmul", "split_packed_matmul"),
        ("MergeQKVLinear", "merge_qkv_linear"),
        ("Sink2", "sink2"),
    ],
)
def test_snake_case(name: str, expected: str) -> None:
    assert _snake_case(name) == expected

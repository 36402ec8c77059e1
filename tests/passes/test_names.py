"""A pass is a file, a class and a name, which are the same words."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.helpers.source_tree import ROOT, parsed


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _pass_classes() -> dict[str, tuple[Path, ast.ClassDef]]:
    """The classes in passes/ that derive from `Pass`, directly or through one another."""
    classes = {
        node.name: (path, node)
        for path in sorted((ROOT / "passes").glob("*.py"))
        for node in ast.walk(parsed(path))
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

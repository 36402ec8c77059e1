"""What is taken from torch and transformers although it is not public: that it is there, and in one place."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import operator
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.helpers.source_tree import MODULES, imported_names, parsed
from tpcompile.ir import dynamo_internals, hf_internals, torch_internals

INTERNALS = (torch_internals, dynamo_internals, hf_internals)
ATTRIBUTES = [
    pytest.param(owner, name, id=f"{owner}.{name}")
    for module in INTERNALS
    for owner, names in module.PRIVATE_ATTRIBUTES.items()
    for name in names
]
# Python's, and marks of ours on objects that others read.
NOT_TAKEN = {"_getframe", "_lru_cache_wrapper", "_tp_entry", "_tp_forward", "_tp_inside"}


def _imports() -> Iterator[Any]:
    for module in INTERNALS:
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.ImportFrom) and node.module != "__future__":
                for alias in node.names:
                    yield pytest.param(module.__name__, node.module, alias, id=f"{node.module}.{alias.name}")


@pytest.mark.parametrize(("internals", "module", "alias"), list(_imports()))
def test_a_name_is_there(internals: str, module: str, alias: ast.alias) -> None:
    local = f"{internals}.{alias.asname or alias.name}"
    users = [user for user in MODULES if local in imported_names(user)]
    assert users, "nobody needs it"
    assert hasattr(importlib.import_module(module), alias.name), f"needed by {', '.join(users)}"


def _imports_of_some_versions() -> Iterator[Any]:
    for module in INTERNALS:
        for block in ast.parse(inspect.getsource(module)).body:
            if isinstance(block, ast.Try):
                names = {
                    a.asname or a.name
                    for n in ast.walk(block)
                    if isinstance(n, ast.ImportFrom)
                    for a in n.names
                }
                yield from (pytest.param(module, name, id=name) for name in sorted(names))


@pytest.mark.parametrize(("internals", "name"), list(_imports_of_some_versions()))
def test_a_name_that_versions_have_elsewhere_or_not_at_all(internals: ModuleType, name: str) -> None:
    users = [user for user in MODULES if f"{internals.__name__}.{name}" in imported_names(user)]
    assert users, "nobody needs it"
    assert getattr(internals, name) is not None, "not in this version, for which tests are meant"


@pytest.mark.parametrize(("owner", "name"), ATTRIBUTES)
def test_an_attribute_is_there(owner: str, name: str) -> None:
    users = [module for module, path in MODULES.items() if name in _private_names(path)]
    assert users, "nobody needs it"
    assert _has(owner, name), f"needed by {', '.join(users)}"


def test_dynamo_is_not_loaded_with_the_package() -> None:
    heavy = ("torch._dynamo", "torch._inductor", "torch._functorch.aot_autograd")
    code = f"import sys, tpcompile; print(*sys.modules.keys() & {heavy})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def _has(owner: str, name: str) -> bool:
    """Whether it is an attribute, or what an instance is given: then its class's source has the name."""
    found = _find(owner)
    sources = inspect.getmro(found) if inspect.isclass(found) else (found,)
    return hasattr(found, name) or any(
        re.search(rf"\b{name}\b", inspect.getsource(each))
        for each in sources
        if inspect.ismodule(each) or each.__module__.startswith(("torch", "transformers"))
    )


def _find(owner: str) -> Any:
    module, _, name = owner.partition(":")
    if name:
        return operator.attrgetter(name)(importlib.import_module(module))
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        parent, _, name = module.rpartition(".")
        return getattr(importlib.import_module(parent), name)


def test_no_other_module_takes_what_is_private() -> None:
    ours = {module.__name__ for module in INTERNALS}
    listed = {parameter.values[1] for parameter in ATTRIBUTES} | NOT_TAKEN | _defined_here()
    for module, path in MODULES.items():
        if module in ours:
            continue
        private = {name for name in imported_names(module) if _is_private_import(name)}
        assert not private, f"{module}: import these from ir/torch_internals.py or ir/hf_internals.py"
        attributes = {name for name in _private_names(path) if not _is_operator(name)}
        assert attributes <= listed, f"{module}: list these in PRIVATE_ATTRIBUTES: {attributes - listed}"


def _is_private_import(name: str) -> bool:
    top, *parts = name.split(".")
    return top in ("torch", "transformers", "accelerate") and any(map(_is_private, parts))


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def _is_operator(name: str) -> bool:
    """The rules' table names operators, and one that is missing raises where it is read."""
    torch = importlib.import_module("torch")
    return hasattr(torch.ops.aten, name) or name == "_c10d_functional"


@functools.cache
def _private_names(path: Path) -> frozenset[str]:
    """Private attributes that a file reads, and those that it names to read them."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            names = (arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant))
            found |= {name for name in names if _is_private(name)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _is_private(node.value):
            found |= {node.value} & _ATTRIBUTE_NAMES
    return frozenset(found)


_ATTRIBUTE_NAMES = {parameter.values[1] for parameter in ATTRIBUTES}


def _defined_here() -> set[str]:
    """Private names that the package gives to its own functions, classes and attributes."""
    found = set()
    for path in MODULES.values():
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return found

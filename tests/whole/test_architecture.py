"""Who may import whom, what every file is for, and other rules of the house that no linter knows."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import networkx
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tests.helpers.source_tree import MODULES, ROOT, imported_by, imported_names, imports, parsed

# From low to high. A module imports from lower layers and from its own room only: not from another room of
# the same layer, not lazily, and not for the sake of a type.
LAYERS = (
    ("errors",),
    ("ir",),
    ("ranks",),
    ("rules",),
    ("capture",),
    ("strategies",),
    ("weights",),
    ("planner",),
    ("passes", "lowering"),
    ("pipeline",),
    ("compile_program",),
    ("runtime",),
    ("api",),
    ("from_pretrained", "lint_plan"),
    ("auto_classes",),
    ("__init__",),
    ("__main__",),
)

MOST_LINES_OF_A_FILE = 300
MOST_LINES_OF_A_FUNCTION = 50

# Types of models that are also ordinary words, which a compiler may well say.
ORDINARY_WORDS = {"align", "beam", "bit", "clip", "funnel", "git", "led", "radio", "rag", "sam"}


def _room(module: str) -> str:
    """``ir`` for ``tpcompile.ir.layout.segment``; a file directly in the package is a room of its own."""
    return module.split(".")[1] if "." in module else "__init__"


def test_nothing_is_imported_from_above() -> None:
    layer = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}
    assert {_room(module) for module in MODULES} == layer.keys()
    upward = {
        (module, imported)
        for module, imported in imports()
        if _room(module) != _room(imported) and layer[_room(imported)] >= layer[_room(module)]
    }
    assert not upward


def test_files_form_no_circle() -> None:
    circles = networkx.strongly_connected_components(networkx.DiGraph(imports()))
    assert not [sorted(circle) for circle in circles if len(circle) > 1]


def test_classes_have_names_of_their_own() -> None:
    """A word that is the name of two classes has two meanings."""
    classes = [
        node.name
        for path in MODULES.values()
        for node in parsed(path).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert sorted(set(classes)) == sorted(classes)


def test_nothing_imports_the_checkout_folders() -> None:
    """`import passes` works in a checkout only by accident, and is another module than `tpcompile.passes`."""
    found = {
        (module, name)
        for module in MODULES
        for name in imported_names(module)
        if name.split(".")[0] in ("passes", "lowering")
    }
    assert not found


def test_files_and_functions_are_short() -> None:
    """Docstrings of functions don't count: the public ones are long on purpose."""
    files = {str(path.relative_to(ROOT)): path for path in MODULES.values()}
    long = {name for name, path in files.items() if len(path.read_text().splitlines()) > MOST_LINES_OF_A_FILE}
    assert not long
    functions = {
        node.name
        for path in files.values()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef) and _lines_of_code(node) > MOST_LINES_OF_A_FUNCTION
    }
    assert not functions


def _lines_of_code(function: ast.FunctionDef) -> int:
    texts = [n for n in ast.walk(function) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    every = [function, *texts]
    own, *inside = ((node.end_lineno or 0) - node.lineno + 1 for node in every)
    return own - sum(inside)


def test_docstrings_name_what_is_raised() -> None:
    """Whoever calls a function reads there which errors it raises itself; private ones need no such line."""
    unsaid = {
        f"{path.relative_to(ROOT)}: {node.name}: {kind}"
        for path in MODULES.values()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        for kind in _raised_by(node)
        if (text := ast.get_docstring(node)) and kind not in text
    }
    assert not unsaid


def _raised_by(function: ast.FunctionDef) -> set[str]:
    """The types of errors in a function's own ``raise`` statements."""
    found, inside = set(), list(ast.iter_child_nodes(function))
    while inside:
        node = inside.pop()
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found.add(ast.unparse(node.exc.func).rpartition(".")[2])
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            inside += ast.iter_child_nodes(node)
    return {kind for kind in found - {"AssertionError"} if kind[0].isupper()}


def test_tests_are_in_the_folder_of_their_room() -> None:
    """tests/ has a folder per room; what imports from one room alone is not in tests/whole/."""
    rooms = {_room(module) for module, path in MODULES.items() if path.name == "__init__.py"} - {"__init__"}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == rooms | {"whole", "helpers", "on_ranks", "golden"}
    for path in (ROOT / "tests" / "whole").glob("test_*.py"):
        found = {name for name in imported_by(path) if name.startswith(("tpcompile", "tests.on_ranks"))}
        about = {_room(name) if name.count(".") > 1 else name for name in found} - {"ir", "errors"}
        assert len(about) != 1 or not about <= rooms, f"{path.name} belongs into tests/{about.pop()}"


def test_the_package_stays_easy_to_survey() -> None:
    found = [path for path in (ROOT / "tpcompile").iterdir() if path.name != "__pycache__"]
    assert sum(path.is_dir() for path in found) <= 8
    assert sum(path.is_file() for path in found) <= 10


def test_the_map_shows_every_file() -> None:
    """docs/architecture.md has a table per folder: every file is in a line of it, every line names files."""
    shown, folder = [], ""
    for line in (ROOT / "docs" / "architecture.md").read_text().splitlines():
        if heading := re.match(r"##+ `([a-z_/]+/)`", line):
            folder = heading[1]
        elif row := re.match(r"\| (`[^|]+\.py`[^|]*) \|", line):
            shown += [folder + name for name in re.findall(r"`([a-z_0-9]+\.py)`", row[1])]
    files = {path.relative_to(ROOT).as_posix() for path in MODULES.values() if path.name != "__init__.py"}
    files.add("tpcompile/__init__.py")
    assert not files - set(shown), "files without a line"
    assert not set(shown) - files, "lines without a file"
    assert len(shown) == len(files), "a file with two lines"


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
        for node in _strings(parsed(path))
        if node.value in CONFIG_MAPPING_NAMES.keys() - ORDINARY_WORDS
    ]
    assert not found

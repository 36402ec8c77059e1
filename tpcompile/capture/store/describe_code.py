"""Describes the code that a model consists of, so that a change to any of it is seen.

Two things are looked at, because either can change without the other: the source files (of classes, and of
whatever the user's own files import), and the functions as they are in memory, which may have been replaced.
What is installed is identified by its version, and only the files of the model's classes are read.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import inspect
import sys
import sysconfig
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import torch

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_INSTALLED = tuple(
    {sysconfig.get_path(name) + "/" for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
_TORCH = str(Path(torch.__file__).parent) + "/"
_OURS = __name__.split(".")[0]
Value = Callable[[Any], Any]


class NotCacheable(Exception):
    """Something that cannot be described, so that a change to it would go unseen."""


def qualified(value: Any) -> str:
    """The full name of a class or function."""
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"


def package_versions(names: set[str]) -> list[tuple[str, str | None]]:
    """The versions of installed packages; None for what is not known to be installed."""
    return [(name, _version(name)) for name in sorted(names - sys.stdlib_module_names)]


@functools.cache
def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_torch(value: Any) -> bool:
    """Whether a class or function is torch's own: its version stands for it."""
    module = str(getattr(value, "__module__", "") or "")
    return module == "torch" or module.startswith("torch.")


class CodeDescription:
    """Collects the code behind classes and functions; each is described once.

    Attributes:
        facts: what was found; its representation is the same in every process.
    """

    def __init__(self, value: Value) -> None:
        self.facts: list[Any] = []
        self._value = value
        self._seen: set[Any] = set()
        self._packages: set[str] = set()

    def finish(self) -> list[Any]:
        """All facts, with the versions of the packages in which code was found."""
        return [*self.facts, package_versions(self._packages)]

    def add_class(self, kind: type) -> None:
        """Adds a class: the files of its bases, and their methods as they are now.

        Raises:
            NotCacheable: there is no source for it.
        """
        for base in kind.__mro__:
            if base is object or base in self._seen or is_torch(base):
                continue
            self._seen.add(base)
            top = base.__module__.split(".")[0]
            if top in sys.stdlib_module_names:
                self.facts.append(qualified(base))
                continue
            self._packages.add(top)
            self.facts.append((qualified(base), self._add_file(_source(base))))
            for name, member in sorted(vars(base).items()):
                self._add_member(name, member)

    def add_function(self, function: Any) -> None:
        """Adds a python function, and what it uses of its module."""
        code = getattr(function, "__code__", None)
        if code is None or is_torch(function) or code in self._seen:
            return
        self._seen.add(code)
        self.facts.append((qualified(function), describe_code(code)))
        own = not _installed(code.co_filename)
        if own and code.co_filename not in ("<string>", "<attrs generated>"):
            self._add_file(code.co_filename)
        for name in sorted(_names(code)):
            if name in function.__globals__:
                self._add_global(name, function.__globals__[name], deeper=own)
        for cell in function.__closure__ or ():
            try:
                held = cell.cell_contents
            except ValueError:  # empty
                continue
            if isinstance(held, types.FunctionType):
                self.add_function(held)
            elif isinstance(held, _PLAIN):
                self.facts.append(("closure", repr(held)))

    def _add_member(self, name: str, member: Any) -> None:
        if isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        if isinstance(member, property):
            member = member.fget
        if not isinstance(member, (types.FunctionType, type)):  # functools.cache and the like
            member = getattr(member, "__wrapped__", member)
        if isinstance(member, types.FunctionType):
            self.add_function(member)
        elif isinstance(member, _PLAIN) and not name.startswith("__"):
            self.facts.append((name, repr(member)))

    def _add_global(self, name: str, value: Any, *, deeper: bool) -> None:
        """Adds what a function finds under a name of its module: other functions, constants, registries."""
        if not isinstance(value, (types.FunctionType, types.ModuleType, type)):
            value = inspect.getattr_static(value, "__wrapped__", value)
        if isinstance(value, types.FunctionType):
            if deeper:
                self.add_function(value)
            elif not is_torch(value):
                self.facts.append((name, describe_code(value.__code__)))
        elif isinstance(value, _PLAIN) and not name.startswith("__"):
            self.facts.append((name, repr(value)))
        elif isinstance(value, torch.Tensor):
            self.facts.append((name, self._value(value)))
        elif isinstance(value, type):
            self.facts.append((name, qualified(value)))
        elif isinstance(value, Mapping) and id(value) not in self._seen:
            self._seen.add(id(value))
            for table in _tables(value):
                for key in sorted(key for key in table if isinstance(key, str)):
                    self.facts.append((name, key, _entry(dict.__getitem__(table, key))))

    def _add_file(self, path: str) -> str:
        """The hash of a source file; files of the user's own bring those that they import."""
        if path not in self._seen:
            files = [path] if _installed(path) else own_files(path, self._seen)
            self._seen.update(files)
            if not _installed(path):
                self._packages |= _packages_imported(files)
                self.facts.append(("files", [file_hash(found) for found in files]))
        return file_hash(path)


def _tables(value: Mapping[Any, Any]) -> list[dict[Any, Any]]:
    """The dicts behind a registry, which may import things when it is read through its own methods."""
    if isinstance(value, dict):
        return [value]
    inner = [*vars(type(value)).values(), *getattr(value, "__dict__", {}).values()]
    return [table for table in inner if isinstance(table, dict)]


def _entry(item: Any) -> Any:
    if isinstance(item, types.FunctionType):
        return qualified(item), describe_code(item.__code__)
    if isinstance(item, type):
        return qualified(item)
    return repr(item) if isinstance(item, _PLAIN) else qualified(type(item))


def _source(kind: type) -> str:
    try:
        found = inspect.getsourcefile(kind)
    except (TypeError, OSError):
        found = None
    if found is None or not Path(found).is_file():
        raise NotCacheable(f"{qualified(kind)} has no source file")
    return found


def _installed(path: str) -> bool:
    return path.startswith(_INSTALLED) or path.startswith(_TORCH) or path.startswith("<frozen")


def file_hash(path: str) -> str:
    """The hash of a file's contents."""
    try:
        found = Path(path).stat()
        return _file_hash(path, found.st_mtime_ns, found.st_size)
    except OSError as error:
        raise NotCacheable(f"the source file {path} cannot be read: {error}") from None


@functools.cache
def _file_hash(path: str, changed: int, size: int) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def describe_code(code: types.CodeType) -> str:
    """The hash of compiled code, wherever it stands in its file."""
    return hashlib.sha256(repr(_code(code)).encode()).hexdigest()


def _code(code: types.CodeType) -> tuple[Any, ...]:
    constants = [
        _code(constant)
        if isinstance(constant, types.CodeType)
        # The order of a set's representation changes from process to process.
        else (sorted(map(repr, constant)) if isinstance(constant, frozenset) else repr(constant))
        for constant in code.co_consts
    ]
    return (code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, code.co_flags)


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)


def own_files(path: str, known: Collection[Any]) -> list[str]:
    """A file, and those that it imports, directly or not, as far as they are neither installed nor known.

    The files are read, nothing is imported.
    """
    found = {path}
    todo = [path]
    while todo:
        for imported in _imported_files(todo.pop()):
            if imported not in found and imported not in known and not _installed(imported):
                found.add(imported)
                if imported.endswith(".py"):
                    todo.append(imported)
    return sorted(found)


def _packages_imported(files: Iterable[str]) -> set[str]:
    """The first parts of the absolute names that files import."""
    names = (name for at in files if at.endswith(".py") for level, name in _import_names(at) if not level)
    return {name.split(".")[0] for name in names}


def _imported_files(path: str) -> Iterator[str]:
    for level, name in _import_names(path):
        parts = name.split(".") if name else []
        if level:
            parents = Path(path).parents
            if level <= len(parents):
                yield from _below(parents[level - 1], parts)
        else:
            yield from _absolute(parts)


def _import_names(path: str) -> tuple[tuple[int, str], ...]:
    return _parse_imports(path, file_hash(path))


@functools.cache
def _parse_imports(path: str, content: str) -> tuple[tuple[int, str], ...]:
    """Level and name of every import; ``from a import b`` may mean the module ``a.b``."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError):
        return ()
    found: dict[tuple[int, str], None] = {}
    todo: list[ast.AST] = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found.update({(0, alias.name): None for alias in node.names})
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            found.update({(node.level, ".".join(filter(None, (base, a.name)))): None for a in node.names})
        elif isinstance(node, ast.If) and _for_type_checkers(node.test):
            todo.extend(node.orelse)
        else:
            todo.extend(ast.iter_child_nodes(node))
    return tuple(found)


def _for_type_checkers(test: ast.expr) -> bool:
    """Whether a condition is ``TYPE_CHECKING``: lazily importing packages name all of their modules there."""
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def _absolute(parts: list[str]) -> Iterator[str]:
    top = parts[0]
    spec = None if top in sys.stdlib_module_names or top == _OURS else _find(top)
    if spec is None:
        return
    if spec.origin is not None and Path(spec.origin).is_file():
        if _installed(spec.origin):
            return
        yield spec.origin
    for folder in spec.submodule_search_locations or ():
        yield from _below(Path(folder), parts[1:])


@functools.cache
def _find(top: str) -> ModuleSpec | None:
    try:
        return PathFinder.find_spec(top)
    except (ImportError, ValueError):
        return None


def _below(folder: Path, parts: list[str]) -> Iterator[str]:
    """The files of a dotted name below a package's folder: every ``__init__`` on the way, and the module."""
    for number, part in enumerate([*parts, ""]):
        initial = folder / "__init__.py"
        if initial.is_file():
            yield str(initial)
        module = folder / f"{part}.py"
        if part and module.is_file():
            yield str(module)
            return
        folder = folder / part
        if not part or number == len(parts) or not folder.is_dir():
            return

"""Answers what a model's python asks of an open size as the number would that it stands for.

torch turns comparisons and arithmetic of open sizes into guards. Python can ask for more: that a size is an
``int`` is known of all of them; its text and its hash are those of one number, and asking for them fixes it.
"""

from __future__ import annotations

import ast
import functools
import linecache
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from opcode import opmap
from types import CodeType, FrameType, FunctionType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

from tpcompile.ir.torch_internals import FakeTensor, FunctionalTensor

from .look_inside import is_librarys, module_of
from .ordered_sets import OrderedSet

OPEN = "open size "
"""What the text of an open size begins with in messages."""

_NUMBERS: dict[type, type] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
_COMPARISONS = ("__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__")
_SPEAKS = re.compile(
    r"print|(\w+\.)*_?(log|logger|logging|warnings)\.\w+|torch\._(assert|check\w*)|torch_compilable_check",
    re.IGNORECASE,
)
"""Functions that are given texts for messages."""


def is_message(frame: FrameType) -> bool:
    """Whether a line makes text for a message, which nothing is computed from."""
    return is_librarys(module_of(frame), "warnings") or frame.f_lineno in _messages(frame.f_code.co_filename)


@functools.lru_cache(maxsize=256)
def _messages(file: str) -> frozenset[int]:
    """The lines of a file whose statements raise, assert, log or check something."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return frozenset()
    found: set[int] = set()
    for node in ast.walk(tree):
        call = node.value if isinstance(node, ast.Expr) else None
        speaks = isinstance(call, ast.Call) and _SPEAKS.fullmatch(ast.unparse(call.func))
        if isinstance(node, ast.stmt) and (speaks or isinstance(node, ast.Raise | ast.Assert)):
            found.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return frozenset(found)


@contextmanager
def sizes_as_numbers() -> Iterator[None]:
    """Lets open sizes have the text, the hash and the comparisons of numbers, for the model's python."""
    with ExitStack() as stack:
        for symbol, kind in _NUMBERS.items():
            written: Any = symbol.__repr__
            changed = {
                "__repr__": _spelling(written, kind, lambda number, _: repr(number)),
                "__format__": _spelling(written, kind, format),
                "__hash__": _hashing(symbol.__hash__, kind),
            }
            if symbol is not torch.SymBool:
                changed |= {name: _comparing(getattr(symbol, name)) for name in _COMPARISONS}
            for name, method in changed.items():
                stack.enter_context(patch.object(symbol, name, method))
        yield


def _spelling(
    written: Callable[[Any], str], kind: type, text: Callable[[Any, str], str]
) -> Callable[..., str]:
    def spell(size: Any, spec: str = "") -> str:
        frame = sys._getframe(1)
        original = written(size)
        if is_librarys(module_of(frame), "sympy", "tpcompile") or original.replace(".", "").isdigit():
            return format(original, spec) if spec else original
        return f"{OPEN}{original}" if is_message(frame) else text(kind(size), spec)

    return unseen(spell)


def _hashing(original: Any, kind: type) -> Callable[[Any], int]:
    def find_hash(size: Any) -> int:
        # Libraries, such as einops, know that symbols have none.
        library = "site-packages" in sys._getframe(1).f_code.co_filename
        return original(size) if library or size.node.is_nested_int() else hash(kind(size))

    return unseen(find_hash)


def _comparing(original: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def compare(size: Any, other: Any) -> Any:
        found = original(size, other)
        if not isinstance(found, torch.SymBool) or is_librarys(
            module_of(sys._getframe(1)), "sympy", "tpcompile"
        ):
            return found
        return found if has_free_unbacked_symbols(found) else bool(found)

    return unseen(compare)


def unseen(function: Any) -> Any:
    """The function, in a frame that torch does not take for the model's: it looks whether that asserts."""
    function.__code__ = function.__code__.replace(co_filename="<string>")
    return function


@contextmanager
def types_of_numbers(functions: Sequence[FunctionType], is_open: bool) -> Iterator[None]:
    """Lets ``isinstance`` and ``type`` say in functions what they say where nothing is traced.

    Sets are made there that all ranks go through in one order.

    Args:
        functions: the model's; all of their modules are meant.
        is_open: whether there are open sizes.

    Raises:
        ValueError: a function looks at types by ``match``, and there are.
    """
    if is_open and any(map(_matches, functions)):
        raise ValueError("forward looks by match whether something is a number")
    tables = {id(f.__globals__): f.__globals__ for f in functions}
    own = {"isinstance": _isinstance, "type": _type, "set": OrderedSet}
    added = [(table, name) for table in tables.values() for name in own if name not in table]
    for table, name in added:
        table[name] = own[name]
    try:
        yield
    finally:  # not by patch.dict, which would put back what forward does to other globals, unseen
        for table, name in added:
            table.pop(name, None)


def _isinstance(value: Any, kinds: Any) -> bool:
    kinds = type if kinds is _type else kinds
    if isinstance(kinds, tuple):
        return any(_isinstance(value, kind) for kind in kinds)
    number = _NUMBERS.get(type(value))
    return isinstance(value, kinds) or (number is not None and isinstance(number(), kinds))


def _type(value: Any, *rest: Any, **kwargs: Any) -> Any:
    if rest:
        return type(value, *rest, **kwargs)
    kind = type(value)
    if kind in (FakeTensor, FunctionalTensor):
        return nn.Parameter if isinstance(value, nn.Parameter) else Tensor
    if kind is set:
        return OrderedSet
    return _type if kind is type else _NUMBERS.get(kind, kind)


def _matches(function: FunctionType) -> bool:
    code: CodeType = function.__code__
    return opmap["MATCH_CLASS"] in code.co_code[::2] and not {"int", "float", "bool"}.isdisjoint(
        code.co_names
    )

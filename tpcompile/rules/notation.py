"""Rules as one line of text: ``"... k, n k, n? -> ... n; once 2; linear 0,2; contraction"``.

Before the first ``;`` stand the dimensions of the operands and of the results, one letter each;
``...`` is any number of leading dimensions, ``n?`` marks an operand that may be missing (such operands
stand last). A letter that only operands have is summed. After it, in any order:

    whole k m      these letters may not be divided
    reduce k:max   the letter is reduced by ``max`` (``sum`` is the default for missing letters)
    linear 0,2|1   sets of operands through which a partial sum passes
    once 2         operands that count once under a sum
    fixed 1        results that depend on no operand's values
    contraction    a matmul-like operator
    localize NAME  the rewrite that dividing needs (``lowering/localise.py``)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NoReturn

from tpcompile.errors import TpCompileError
from tpcompile.ir.sizes import Size

from .rule import Dim, Labels, Rule

_OPTIONS = ("whole", "reduce", "linear", "once", "fixed", "contraction", "localize")
LOCALISERS = (
    "attention",
    "flex_attention",
    "group_norm",
    "grouped_matmul",
    "groups",
    "lookup",
    "mean",
    "pick",
    "sizes",
    "split",
)
_TODO = "see the notation in tpcompile/rules/notation.py"


@dataclass(frozen=True)
class Row:
    """A parsed line, still for any shape."""

    inputs: tuple[tuple[str, ...], ...]
    optional: int
    outputs: tuple[tuple[str, ...], ...]
    whole: frozenset[str]
    reduce: tuple[tuple[str, str], ...]
    linear: tuple[frozenset[int], ...]
    once: frozenset[int]
    fixed: frozenset[int]
    contraction: bool
    localize: str


@cache
def parse_row(text: str) -> Row:
    """Parses one line of the notation.

    Raises:
        TpCompileError: the line does not follow the notation.
    """
    equation, *options = [part.strip() for part in text.split(";")]
    if equation.count("->") != 1:
        _refuse("a rule needs one '->'", text)
    left, right = (side.split(",") for side in equation.split("->"))
    fields = _options(options, text)
    missing = ["?" in term for term in left]
    if missing != sorted(missing):
        _refuse("an operand that may be missing stands before one that may not", text)
    row = Row(
        inputs=tuple(_letters(term.replace("?", ""), text) for term in left),
        optional=sum(missing),
        outputs=tuple(_letters(term, text) for term in right),
        whole=frozenset(fields.get("whole", "").split()),
        reduce=_reductions(fields.get("reduce", ""), text),
        linear=tuple(_numbers(g, text) for g in fields.get("linear", "").split("|") if g),
        once=_numbers(fields.get("once", ""), text),
        fixed=_numbers(fields.get("fixed", ""), text),
        contraction="contraction" in fields,
        localize=fields.get("localize", ""),
    )
    _check(row, text)
    return row


def _options(options: list[str], text: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for option in options:
        key, _, rest = option.partition(" ")
        if key not in _OPTIONS:
            _refuse(f"unknown option {key!r} in a rule", text, f"options are {', '.join(_OPTIONS)}")
        if key in fields:
            _refuse(f"the option {key!r} stands twice", text)
        if bool(rest.strip()) == (key == "contraction"):
            _refuse(f"{key!r} is followed by {rest!r}", text)
        fields[key] = rest.strip()
    return fields


def _refuse(what: str, where: str, todo: str = _TODO) -> NoReturn:
    raise TpCompileError(what, where=f"the rule {where!r}", todo=todo)


def _letters(term: str, text: str) -> tuple[str, ...]:
    names = tuple(term.split())
    for name in names:
        if not re.fullmatch(r"[A-Za-z]\w*|1|\.\.\.", name):
            _refuse(f"{name!r} is not a letter, '1' or '...'", text)
    letters = [n for n in names if n != "1"]
    if len(set(letters)) != len(letters):
        _refuse(f"a letter stands twice in '{term.strip()}'", text)
    return names


def _numbers(text: str, where: str) -> frozenset[int]:
    words = re.split(r"[,\s]+", text.strip())
    if not all(w.isdecimal() for w in words if w):
        _refuse(f"'{text}' does not give numbers of operands or results", where)
    return frozenset(int(w) for w in words if w)


def _reductions(text: str, where: str) -> tuple[tuple[str, str], ...]:
    pairs = [tuple(item.partition(":")[::2]) for item in text.split()]
    if any(how not in ("sum", "max", "min") for _, how in pairs):
        _refuse("a letter is reduced by sum, max or min, as in 'reduce k:max'", where)
    return tuple((letter, how) for letter, how in pairs)


def _check(row: Row, text: str) -> None:
    """What options name must be there."""
    known = {name for term in row.inputs + row.outputs for name in term}
    for letter in (*row.whole, *(letter for letter, _ in row.reduce)):
        if letter not in known:
            _refuse(f"no operand or result has the letter {letter!r}", text)
    named = frozenset().union(*row.linear, row.once)
    if any(i >= len(row.inputs) for i in named) or any(i >= len(row.outputs) for i in row.fixed):
        _refuse("an option names an operand or result that is not there", text)
    if row.localize and row.localize not in LOCALISERS:
        _refuse(f"there is no rewrite {row.localize!r}", text, f"those are {', '.join(LOCALISERS)}")


def _bind(pattern: Sequence[str], shape: Sequence[Size], sizes: dict[str, Size]) -> Labels | str:
    """Labels of one tensor, or why the pattern does not fit its shape."""
    names = list(pattern)
    if "..." in names:
        at = names.index("...")
        extra = len(shape) - (len(names) - 1)
        if extra < 0:
            return f"rank {len(shape)} is too small for '{' '.join(pattern)}'"
        # Counted from the right, so that operands of different rank broadcast as torch does.
        names[at : at + 1] = [f"...{extra - i}" for i in range(extra)]
    if len(names) != len(shape):
        return f"rank {len(shape)} does not fit '{' '.join(pattern)}'"
    labels: list[Dim] = []
    for name, size in zip(names, shape, strict=True):
        if size == 1 or name == "1":
            labels.append(())
            continue
        if sizes.setdefault(name, size) != size:
            return f"{name} is {sizes[name]} and {size}"
        labels.append((name,))
    return tuple(labels)


def instantiate(row: Row, inputs: Sequence[Sequence[Size]], outputs: Sequence[Sequence[Size]]) -> Rule | str:
    """The rule of a node with these shapes, or why the row does not fit."""
    missing = len(row.inputs) - len(inputs)
    if not 0 <= missing <= row.optional:
        return f"{len(inputs)} operands, the rule has {len(row.inputs)}"
    if len(outputs) != len(row.outputs):
        return f"{len(outputs)} results, the rule has {len(row.outputs)}"
    sizes: dict[str, Size] = {}
    labels = []
    shapes = [*inputs, *outputs]
    for pattern, shape in zip(row.inputs[: len(inputs)] + row.outputs, shapes, strict=True):
        bound = _bind(pattern, shape, sizes)
        if isinstance(bound, str):
            return bound
        labels.append(bound)
    ins, outs = tuple(labels[: len(inputs)]), tuple(labels[len(inputs) :])
    kept = {letter for tensor in outs for dim in tensor for letter in dim}
    reduce = {letter: "sum" for letter in sizes if letter not in kept} | dict(row.reduce)
    present = range(len(inputs))
    return Rule(
        inputs=ins,
        outputs=outs,
        sizes=sizes,
        whole=row.whole & sizes.keys(),
        reduce={k: v for k, v in reduce.items() if k in sizes and k not in row.whole},
        linear=tuple(group & set(present) for group in row.linear if group & set(present)),
        once=row.once & set(present),
        fixed=row.fixed,
        nonempty=any(how != "sum" for _, how in row.reduce),  # of nothing there is no maximum
        contraction=row.contraction,
        localize=row.localize,
    )

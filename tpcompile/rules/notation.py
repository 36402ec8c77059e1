"""Rules as one line of text: ``"... k, n k, n? -> ... n; once 2; linear 0,2; contraction"``.

Before the first ``;`` stand the dimensions of the operands and of the results, one letter each;
``...`` is any number of leading dimensions, ``n?`` marks an operand that may be missing (it closes
the list of operands). A letter that only operands have is summed. After it, in any order:

    whole k m      these letters may not be divided
    reduce k:max   the letter is reduced by ``max`` (``sum`` is the default for missing letters)
    linear 0,2|1   sets of operands through which a partial sum passes
    once 2         operands that count once under a sum
    contraction    a matmul-like operator
    localize NAME  the rewrite that dividing needs (``lowering/localize.py``)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..errors import TpCompileError
from .rule import Labels, Rule, Size


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
    contraction: bool
    localize: str


@lru_cache(maxsize=None)
def parse_row(text: str) -> Row:
    """Parses one line of the notation.

    Raises:
        TpCompileError: the line does not follow the notation.
    """
    equation, *options = [part.strip() for part in text.split(";")]
    if equation.count("->") != 1:
        raise TpCompileError("a rule needs one '->'", where=text, todo="see tpcompile/rules/notation.py")
    left, right = (side.split(",") for side in equation.split("->"))
    fields: dict[str, str] = {}
    for option in options:
        key, _, rest = option.partition(" ")
        if key not in ("whole", "reduce", "linear", "once", "contraction", "localize"):
            raise TpCompileError(f"unknown option {key!r} in a rule", where=text)
        fields[key] = rest
    return Row(
        inputs=tuple(tuple(t.replace("?", "").split()) for t in left),
        optional=sum("?" in t for t in left),
        outputs=tuple(tuple(t.split()) for t in right),
        whole=frozenset(fields.get("whole", "").split()),
        reduce=tuple(tuple(r.split(":")) for r in fields.get("reduce", "").split()),  # type: ignore[misc]
        linear=tuple(
            frozenset(int(i) for i in group.split(",")) for group in fields.get("linear", "").split("|") if group
        ),
        once=frozenset(int(i) for i in fields.get("once", "").split()),
        contraction="contraction" in fields,
        localize=fields.get("localize", ""),
    )


def _bind(pattern: tuple[str, ...], shape: tuple[Size, ...], sizes: dict[str, Size]) -> Labels | str:
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
    labels = []
    for name, size in zip(names, shape, strict=True):
        if size == 1 or name == "1":
            labels.append(())
            continue
        if sizes.setdefault(name, size) != size:
            return f"{name} is {sizes[name]} and {size}"
        labels.append((name,))
    return tuple(labels)


def instantiate(row: Row, inputs: list[tuple[Size, ...]], outputs: list[tuple[Size, ...]]) -> Rule | str:
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
        linear=tuple(group & set(present) for group in row.linear),
        once=row.once & set(present),
        contraction=row.contraction,
        localize=row.localize,
    )

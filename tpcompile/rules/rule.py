"""The form of a sharding rule: how the dimensions of an operator's operands and results relate.

A rule labels every dimension with letters, major first, as in einsum; a letter that stands in
several places is one factor of the computation. From the labels follow which placements are legal,
what the results' placements are, and which gradients need a reduction. The idea is Shardy's
(openxla/shardy, "sharding rule"): ``([i, k], [k, j]) -> ([i, j]) reduction={k}``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from tpcompile.ir.placements import Placement
from tpcompile.ir.sizes import Size

Dim: TypeAlias = tuple[str, ...]
Labels: TypeAlias = tuple[Dim, ...]

UNARY = (frozenset({0}),)
"""``linear`` of an operator that is linear in its only operand."""


@dataclass(frozen=True)
class Declared:
    """The only placements of an operator that somebody else has divided already, on every axis alike.

    Attributes:
        inputs: per operand.
        outputs: per result.
        summed: whole operands of whose gradients every rank has a summand.
        weights: the number of the first operand that is placed in a way of its own, whatever is said of it.
    """

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]
    summed: frozenset[int]
    weights: int


@dataclass(frozen=True)
class Rule:
    """The rule of one node.

    Attributes:
        inputs: per tensor operand (in the order of ``operands``), per dimension, its letters.
        outputs: the same per tensor result.
        sizes: the size of every letter.
        whole: letters that may not be divided (a softmax's, a sort's).
        reduce: letters missing from the results, with the reduction that completes them.
        linear: sets of operands through which ``P(sum)`` passes if all of a set are partial.
        once: operands that count once under a sum (a bias): partial when a ``sum`` letter is divided.
        fixed: results whose values no operand's values change: whole where they have no divided letter.
        nonempty: torch refuses empty operands, so that every rank must have a part of what is divided.
        contraction: a matmul-like operator: its letters are worth dividing, its cost is arithmetic.
        localize: the name of the rewrite that a divided letter needs, if constants do not do it.
        declared: the placements of an operator that does its own division.
    """

    inputs: tuple[Labels, ...]
    outputs: tuple[Labels, ...]
    sizes: Mapping[str, Size]
    whole: frozenset[str] = frozenset()
    reduce: Mapping[str, str] = field(default_factory=dict)
    linear: tuple[frozenset[int], ...] = ()
    once: frozenset[int] = frozenset()
    fixed: frozenset[int] = frozenset()
    nonempty: bool = False
    contraction: bool = False
    localize: str = ""
    declared: Declared | None = None

    def __str__(self) -> str:
        def tensor(labels: Labels) -> str:
            return " ".join(
                "1" if not d else d[0] if len(d) == 1 else "(" + " ".join(d) + ")" for d in labels
            )

        text = ", ".join(map(tensor, self.inputs)) + " -> " + ", ".join(map(tensor, self.outputs))
        if self.reduce:
            text += "  reduce " + " ".join(f"{k}:{v}" for k, v in self.reduce.items())
        if self.whole:
            text += "  whole " + " ".join(sorted(self.whole))
        if self.declared:
            lie = (", ".join(map(str, side)) for side in (self.declared.inputs, self.declared.outputs))
            text += "  only " + " -> ".join(lie)
        return text


class Letters:
    """Hands out fresh letters and remembers their sizes."""

    def __init__(self) -> None:
        self.sizes: dict[str, Size] = {}

    def new(self, size: Size) -> str:
        """A letter of this size."""
        name = chr(ord("a") + len(self.sizes)) if len(self.sizes) < 26 else f"f{len(self.sizes)}"
        self.sizes[name] = size
        return name

    def dim(self, size: Size) -> Dim:
        """The label of one dimension: a fresh letter, or none for size 1."""
        return () if size == 1 else (self.new(size),)

    def dims(self, shape: Sequence[Size]) -> Labels:
        """The labels of several dimensions, all fresh."""
        return tuple(self.dim(s) for s in shape)


def letters_of(labels: Iterable[Dim]) -> frozenset[str]:
    """All letters in the labels of one tensor."""
    return frozenset(letter for dim in labels for letter in dim)


def aligned(sizes: Sequence[Size], full: Labels) -> Labels:
    """Labels of an operand that broadcasts to ``full``: from the right, none where it has size 1."""
    pad = len(full) - len(sizes)
    return tuple(() if size == 1 else full[pad + i] for i, size in enumerate(sizes))

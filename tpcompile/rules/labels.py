"""Labels of dimensions, edited: for rules about operators that work along one dimension."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import Node

from tpcompile.ir.nodes import operands, option, shape
from tpcompile.ir.sizes import Size

from .rule import Dim, Labels, Letters


def labelled(node: Node) -> tuple[Letters, Labels]:
    """Letters for a rule, and those of the first operand's dimensions."""
    letters = Letters()
    return letters, letters.dims(shape(operands(node)[0]))


def dim_of(node: Node, rank: int, name: str = "dim") -> int:
    return int(option(node, name, 0)) % rank


def fresh_except(sizes: Sequence[Size], dims: Iterable[int], letters: Letters) -> Labels:
    """Fresh labels for all dimensions but some."""
    left_out = set(dims)
    return letters.dims([1 if d in left_out else s for d, s in enumerate(sizes)])


def replaced(labels: Labels, dim: int, new: Dim) -> Labels:
    """Labels with one dimension replaced."""
    return (*labels[:dim], new, *labels[dim + 1 :])


def without(labels: Labels, dim: int) -> Labels:
    return labels[:dim] + labels[dim + 1 :]

"""Labels of dimensions, edited: for rules about operators that work along one dimension."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch.fx import Node

from tpcompile.ir.nodes import operands, option, results, shape
from tpcompile.ir.sizes import Size, sizes_of

from .rule import Dim, Labels, Letters, Rule, letters_of


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


def resized(node: Node, dims: Collection[int], linear: bool, nonempty: bool) -> Rule:
    """The rule of an operator that changes the sizes of some dimensions, which are whole; the others pass.

    Args:
        node: the call.
        dims: these dimensions.
        linear: whether it is linear in all its operands together.
        nonempty: see ``Rule``.
    """
    letters, ops = Letters(), operands(node)
    kept = fresh_except(shape(ops[0]), dims, letters)

    def labels(sizes: Sequence[Size]) -> Labels:
        return tuple(letters.dim(s) if d in dims else kept[d] for d, s in enumerate(sizes))

    return Rule(
        tuple(labels(shape(o)) for o in ops),
        tuple(labels(sizes_of(r)) for r in results(node)),
        letters.sizes,
        whole=frozenset(letters.sizes) - letters_of(kept),
        linear=(frozenset(range(len(ops))),) if linear else (),
        nonempty=nonempty,
    )


def broadcast_dims(shapes: Sequence[Sequence[Size]], letters: Letters) -> Labels:
    """The dimensions that all shapes broadcast to; ``aligned`` gives each operand's."""
    width = max(map(len, shapes))
    padded = [(1,) * (width - len(s)) + tuple(s) for s in shapes]
    return letters.dims([next((s for s in sizes if s != 1), 1) for sizes in zip(*padded, strict=True)])


def replaced(labels: Labels, dim: int, new: Dim) -> Labels:
    """Labels with one dimension replaced."""
    return (*labels[:dim], new, *labels[dim + 1 :])


def without(labels: Labels, dim: int) -> Labels:
    return labels[:dim] + labels[dim + 1 :]

"""Rules of operators that only rearrange: views, permutations, expansion, repetition."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from .rule import Dim, Labels, Letters, Rule, Size, argument, divide, operands, results, shape


def align(left: Sequence[Size], right: Sequence[Size], letters: Letters) -> tuple[Labels, Labels, set[str]]:
    """Labels two shapes with the same number of elements by their common factors.

    Walks both from the major end and splits the larger size by the smaller, which is how a view
    splits or joins dimensions. Where no size divides the other, the rest of that group gets letters
    of its own on either side, returned as the third value: these must stay whole.
    """
    out: tuple[list[Dim], list[Dim]] = ([], [])
    stuck: set[str] = set()
    a, b = [s for s in left], [s for s in right]
    i = j = 0
    rest_a: Size | None = None
    rest_b: Size | None = None
    dim_a: list[str] = []
    dim_b: list[str] = []

    def close(side: int, dim: list[str]) -> None:
        out[side].append(tuple(dim))
        dim.clear()

    while i < len(a) or j < len(b):
        size_a = rest_a if rest_a is not None else (a[i] if i < len(a) else 1)
        size_b = rest_b if rest_b is not None else (b[j] if j < len(b) else 1)
        if i < len(a) and size_a == 1:
            close(0, dim_a)
            i, rest_a = i + 1, None
        elif j < len(b) and size_b == 1:
            close(1, dim_b)
            j, rest_b = j + 1, None
        elif size_a == size_b:
            letter = letters.new(size_a)
            dim_a.append(letter)
            dim_b.append(letter)
            close(0, dim_a)
            close(1, dim_b)
            i, j, rest_a, rest_b = i + 1, j + 1, None, None
        elif (quotient := divide(size_a, size_b)) is not None:
            letter = letters.new(size_b)
            dim_a.append(letter)
            dim_b.append(letter)
            close(1, dim_b)
            j, rest_b, rest_a = j + 1, None, quotient
        elif (quotient := divide(size_b, size_a)) is not None:
            letter = letters.new(size_a)
            dim_a.append(letter)
            dim_b.append(letter)
            close(0, dim_a)
            i, rest_a, rest_b = i + 1, None, quotient
        else:
            for side, dim, sizes, at, rest in ((0, dim_a, a, i, rest_a), (1, dim_b, b, j, rest_b)):
                for k in range(at, len(sizes)):
                    size = rest if k == at and rest is not None else sizes[k]
                    if size != 1:
                        stuck.add(letters.new(size))
                        dim.append(list(letters.sizes)[-1])
                    close(side, dim)
            break
    return tuple(out[0]), tuple(out[1]), stuck


def view(node: Node) -> Rule:
    """``(b, s, (h d)) -> (b, s, h, d)``: common factors of both shapes."""
    letters = Letters()
    source, target, stuck = align(shape(operands(node)[0]), shape(node), letters)
    return Rule(
        (source,), (target,), letters.sizes, whole=frozenset(stuck), linear=(frozenset({0}),), localize="sizes"
    )


def permute(node: Node) -> Rule:
    """Any reordering of dimensions, told by the strides of nothing but the arguments."""
    source = operands(node)[0]
    rank = len(shape(source))
    name = node.target.__name__ if callable(node.target) else ""
    if name.startswith("permute"):
        order = [d % rank for d in argument(node, 1, "dims")]
    elif name.startswith("t."):
        order = list(reversed(range(rank)))
    else:
        order = list(range(rank))
        d0, d1 = (argument(node, i, f"dim{i - 1}") % rank for i in (1, 2))
        order[d0], order[d1] = order[d1], order[d0]
    letters = Letters()
    dims = letters.dims(shape(source))
    return Rule((dims,), (tuple(dims[d] for d in order),), letters.sizes, linear=(frozenset({0}),))


def keep_sized_dims(node: Node) -> Rule | str:
    """squeeze and unsqueeze: dimensions of size 1 come and go, the others keep their order."""
    letters = Letters()
    dims = letters.dims(shape(operands(node)[0]))
    sized = iter([d for d in dims if d])
    target = []
    for size in shape(node):
        target.append(() if size == 1 else next(sized, None))
    if None in target or next(sized, None) is not None:
        return "the sized dimensions differ"
    return Rule((dims,), (tuple(t or () for t in target),), letters.sizes, linear=(frozenset({0}),))


def expand(node: Node) -> Rule:
    """Dimensions of size 1 become sized; the new ones are factors of the result only."""
    letters = Letters()
    source, target = shape(operands(node)[0]), shape(node)
    new = letters.dims(target)
    pad = len(target) - len(source)
    old = tuple(new[pad + i] if s == target[pad + i] else () for i, s in enumerate(source))
    # A value that is expanded along a divided letter is the same everywhere along it, hence still linear.
    return Rule((old,), (new,), letters.sizes, linear=(frozenset({0}),), localize="sizes")


def repeat(node: Node) -> Rule | str:
    """``repeat``: a repeated dimension is ``(times old)``; ``times`` is a factor of the result only."""
    letters = Letters()
    source, target = shape(operands(node)[0]), shape(node)
    pad = len(target) - len(source)
    old, new, whole = [], [], set()
    for i, size in enumerate(target):
        before = source[i - pad] if i >= pad else 1
        times = divide(size, before)
        if times is None:
            return f"cannot tell how often dimension {i} is repeated"
        outer = () if times == 1 else (letters.new(times),)
        inner = () if before == 1 else (letters.new(before),)
        whole |= set(outer)
        new.append(outer + inner)
        if i >= pad:
            old.append(inner)
    return Rule(
        (tuple(old),), (tuple(new),), letters.sizes, whole=frozenset(whole), linear=(frozenset({0}),)
    )


def repeat_interleave(node: Node) -> Rule | str:
    """``repeat_interleave`` by a constant: a repeated dimension is ``(old times)``."""
    letters = Letters()
    source, target = shape(operands(node)[0]), shape(node)
    if len(source) != len(target):
        return "flattens its input"
    old, new, whole = [], [], set()
    for before, after in zip(source, target, strict=True):
        times = divide(after, before)
        if times is None:
            return "the repetition is no constant"
        outer = () if before == 1 else (letters.new(before),)
        inner = () if times == 1 else (letters.new(times),)
        whole |= set(inner)
        old.append(outer)
        new.append(outer + inner)
    return Rule(
        (tuple(old),), (tuple(new),), letters.sizes, whole=frozenset(whole), linear=(frozenset({0}),)
    )


def same_shape(node: Node) -> Rule:
    """clone, alias, contiguous, detach: nothing moves."""
    letters = Letters()
    dims = letters.dims(shape(operands(node)[0]))
    return Rule((dims,), tuple(dims for _ in results(node)), letters.sizes, linear=(frozenset({0}),))



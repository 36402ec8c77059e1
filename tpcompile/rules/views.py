"""Rules of operators that only rearrange: views, permutations, expansion, repetition."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.fx import Node

from tpcompile.ir.nodes import op_name, operands, option, results, shape
from tpcompile.ir.sizes import Size, divide, sizes_of

from .labels import labelled
from .rule import UNARY, Dim, Labels, Letters, Rule, aligned, letters_of


class _Walk:
    """One shape, cut into factors from its major end."""

    def __init__(self, sizes: Sequence[Size]) -> None:
        self.dims: list[list[str]] = [[] for _ in sizes]
        self._left = list(sizes)
        self._at = 0
        self._skip()

    def _skip(self) -> None:
        while self._at < len(self._left) and self._left[self._at] == 1:
            self._at += 1

    @property
    def size(self) -> Size:
        """What is left of the dimension that the walk is in; 1 at the end."""
        return self._left[self._at] if self._at < len(self._left) else 1

    def take(self, letter: str, size: Size) -> None:
        """Cuts a factor off."""
        rest = 1 if self.size == size else divide(self.size, size)
        assert rest is not None
        self.dims[self._at].append(letter)
        self._left[self._at] = rest
        self._skip()

    def finish(self, letters: Letters) -> set[str]:
        """Gives all that is left letters of its own."""
        new = set()
        while self.size != 1:
            letter = letters.new(self.size)
            self.take(letter, self.size)
            new.add(letter)
        return new

    def labels(self) -> Labels:
        """The factors of every dimension."""
        return tuple(map(tuple, self.dims))


def align(left: Sequence[Size], right: Sequence[Size], letters: Letters) -> tuple[Labels, Labels, set[str]]:
    """Labels two shapes with the same number of elements by their common factors.

    Walks both from the major end and cuts the largest common factor off both, which is how a view
    splits or joins dimensions. Where there is none, all that is left gets letters of its own on
    either side, returned as the third value: these must stay whole.
    """
    a, b = _Walk(left), _Walk(right)
    while (size := _common(a.size, b.size)) is not None:
        letter = letters.new(size)
        a.take(letter, size)
        b.take(letter, size)
    stuck = a.finish(letters) | b.finish(letters)
    return a.labels(), b.labels(), stuck


def _common(a: Size, b: Size) -> Size | None:
    """The largest factor of two sizes, if it is more than 1 and known."""
    if a == 1 or b == 1:
        return None
    if a == b:
        return a
    if isinstance(a, int) and isinstance(b, int):
        return math.gcd(a, b) if math.gcd(a, b) > 1 and a and b else None
    return b if divide(a, b) is not None else a if divide(b, a) is not None else None


def view(node: Node) -> Rule:
    """``(b, s, (h d)) -> (b, s, h, d)``: common factors of both shapes."""
    letters = Letters()
    source, target, stuck = align(shape(operands(node)[0]), shape(node), letters)
    whole = frozenset(stuck)
    return Rule((source,), (target,), letters.sizes, whole=whole, linear=UNARY, localize="sizes")


def permute(node: Node) -> Rule:
    """Any reordering of dimensions."""
    source = operands(node)[0]
    rank = len(shape(source))
    order = list(range(rank))
    if op_name(node) == "permute":
        order = [d % rank for d in option(node, "dims")]
    elif op_name(node) == "t":
        order.reverse()
    else:
        d0, d1 = (option(node, name) % rank for name in ("dim0", "dim1"))
        order[d0], order[d1] = order[d1], order[d0]
    letters = Letters()
    dims = letters.dims(shape(source))
    return Rule((dims,), (tuple(dims[d] for d in order),), letters.sizes, linear=UNARY)


def keep_sized_dims(node: Node) -> Rule | str:
    """squeeze and unsqueeze: dimensions of size 1 come and go, the others keep their order."""
    letters, dims = labelled(node)
    sized = iter([d for d in dims if d])
    target = [() if size == 1 else next(sized, None) for size in shape(node)]
    if None in target or next(sized, None) is not None:
        return "the sized dimensions differ"
    return Rule((dims,), (tuple(t or () for t in target),), letters.sizes, linear=UNARY)


def expand(node: Node) -> Rule:
    """Dimensions of size 1 become sized; the new ones are factors of the result only.

    A value that is expanded along a divided letter is the same everywhere along it, hence still linear.
    """
    letters = Letters()
    new = letters.dims(shape(node))
    source, *pattern = (shape(o) for o in operands(node))  # expand_as has a pattern
    inputs = (aligned(source, new), *(new for _ in pattern))
    return Rule(inputs, (new,), letters.sizes, linear=UNARY, localize="sizes")


def repeat(node: Node) -> Rule | str:
    """``repeat``: a repeated dimension is ``(times old)``; ``times`` is a factor of the result only."""
    source, target = shape(operands(node)[0]), shape(node)
    padded = (1,) * (len(target) - len(source)) + source
    return _repeated(padded, target, len(source), outside=True)


def repeat_interleave(node: Node) -> Rule | str:
    """``repeat_interleave`` by a constant: a repeated dimension is ``(old times)``."""
    source, target = shape(operands(node)[0]), shape(node)
    if len(source) != len(target):
        return "flattens its input"
    return _repeated(source, target, len(source), outside=False)


def _repeated(source: Sequence[Size], target: Sequence[Size], rank: int, outside: bool) -> Rule | str:
    letters = Letters()
    old: list[Dim] = []
    new: list[Dim] = []
    whole: set[str] = set()
    for before, after in zip(source, target, strict=True):
        times = divide(after, before)
        if times is None:
            return "the repetition is not a constant"
        copies, kept = letters.dim(times), letters.dim(before)
        whole.update(copies)
        old.append(kept)
        new.append(copies + kept if outside else kept + copies)
    return Rule(
        (tuple(old[len(old) - rank :]),), (tuple(new),), letters.sizes, whole=frozenset(whole), linear=UNARY
    )


def same_shape(node: Node) -> Rule:
    """clone, alias, contiguous, detach: nothing moves."""
    letters, dims = labelled(node)
    return Rule((dims,), tuple(dims for _ in results(node)), letters.sizes, linear=UNARY)


def kept_whole(node: Node) -> Rule:
    """The marker ``keep_whole``: nothing may be divided or partial."""
    letters, dims = labelled(node)
    return Rule((dims,), (dims,), letters.sizes, whole=frozenset(letters.sizes))


def glu(node: Node) -> Rule:
    """``glu``: a dimension ``(2 f)`` becomes ``f``, which may be divided."""
    letters = Letters()
    source = shape(operands(node)[0])
    dim = option(node, "dim") % len(source)
    target = letters.dims(shape(node))
    half = letters.new(2)
    gated = (*target[:dim], (half, *target[dim]), *target[dim + 1 :])
    return Rule((gated,), (target,), letters.sizes, whole=frozenset({half}))


def pixel_shuffle(node: Node) -> Rule:
    """``(c r s) h w -> c (h r) (w s)``, or the other way round."""
    letters = Letters()
    shuffle = op_name(node) == "pixel_shuffle"
    deep, flat = (
        (shape(operands(node)[0]), shape(node)) if shuffle else (shape(node), shape(operands(node)[0]))
    )
    lead, (height, width) = letters.dims(deep[:-3]), letters.dims(deep[-2:])
    channels = letters.dim(flat[-3])
    factor = option(node, "upscale_factor" if shuffle else "downscale_factor")
    r, s = letters.dim(factor), letters.dim(factor)
    source, target = (*lead, channels + r + s, height, width), (*lead, channels, height + r, width + s)
    if not shuffle:
        source, target = target, source
    return Rule((source,), (target,), letters.sizes, whole=letters_of((r, s)), linear=UNARY)


def windows(node: Node) -> Rule | str:
    """im2col ``[b c h w] -> [b (c taps) places]`` and col2im, the other way: channels may be divided."""
    unfolds = op_name(node) == "im2col"
    source, target = shape(operands(node)[0]), shape(node)
    picture, columns = (source, target) if unfolds else (target, source)
    count = divide(columns[-2], picture[-3])
    if count is None:
        return "the windows are not a multiple of the channels"
    letters = Letters()
    lead, channels, taps = letters.dims(picture[:-3]), letters.dim(picture[-3]), letters.dim(count)
    space, places = letters.dims(picture[-2:]), letters.dim(columns[-1])
    deep, flat = (*lead, channels, *space), (*lead, channels + taps, places)
    source_labels, target_labels = (deep, flat) if unfolds else (flat, deep)
    whole = letters_of((taps, *space, places))
    return Rule((source_labels,), (target_labels,), letters.sizes, whole=whole, linear=UNARY, nonempty=True)


def create(node: Node) -> Rule:
    """``x.new_zeros(sizes)`` and its like: of x only the type is used, the result is divided at will."""
    letters, source = labelled(node)
    result = letters.dims(sizes_of(results(node)[0]))
    return Rule((source,), (result,), letters.sizes, linear=UNARY, fixed=frozenset({0}), localize="sizes")

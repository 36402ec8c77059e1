"""Which parts of which leaves a box of an expression is read from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .expressions import AddDim, Cast, Cut, DropDim, Expression, Join, Leaf, Permute, leaves

Box = tuple[Leaf, tuple[int, ...], tuple[int, ...]]
"""A leaf, where the box begins in it, and its shape."""


def leaf_boxes(e: Expression, offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[Box]:
    """The boxes of leaves that ``Filler.fill`` reads; leaves as a whole where an operator needs them so."""
    if 0 in sizes:
        return
    if isinstance(e, Leaf):
        yield e, tuple(offsets), tuple(sizes)
    elif isinstance(e, Join):
        begin, first, last = 0, offsets[e.dim], offsets[e.dim] + sizes[e.dim]
        for part in e.parts:
            end = begin + part.shape[e.dim]
            start, stop = max(first, begin), min(last, end)
            if start < stop:
                yield from leaf_boxes(
                    part, _with(offsets, e.dim, start - begin), _with(sizes, e.dim, stop - start)
                )
            begin = end
    elif isinstance(e, Permute):
        back = sorted(range(len(e.dims)), key=lambda i: e.dims[i])
        yield from leaf_boxes(e.of, [offsets[i] for i in back], [sizes[i] for i in back])
    elif isinstance(e, Cut):
        yield from leaf_boxes(e.of, _with(offsets, e.dim, offsets[e.dim] + e.start), sizes)
    elif isinstance(e, AddDim):
        yield from leaf_boxes(e.of, *([*x[: e.dim], *x[e.dim + 1 :]] for x in (offsets, sizes)))
    elif isinstance(e, DropDim):
        yield from leaf_boxes(
            e.of, [*offsets[: e.dim], 0, *offsets[e.dim :]], [*sizes[: e.dim], 1, *sizes[e.dim :]]
        )
    elif isinstance(e, Cast):
        yield from leaf_boxes(e.of, offsets, sizes)
    else:
        for leaf in leaves(e):
            yield leaf, (0,) * len(leaf.shape), leaf.shape


def _with(values: Sequence[int], at: int, value: int) -> list[int]:
    return [value if i == at else v for i, v in enumerate(values)]

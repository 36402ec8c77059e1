"""Rules of operators that pick or place elements by index: but for gather, the indexed dimension is whole."""

from __future__ import annotations

from itertools import chain, repeat, takewhile

from torch.fx import Node

from tpcompile.ir.nodes import op_name, operands, option, shape
from tpcompile.ir.sizes import Size

from .labels import broadcast_dims, dim_of, labelled, replaced, without
from .rule import UNARY, Dim, Labels, Letters, Rule, aligned, letters_of


def index_select(node: Node) -> Rule:
    """index_select: the dimension is replaced by the index's, which may be a number."""
    letters, source = labelled(node)
    dim = dim_of(node, len(source))
    new = letters.dim(shape(node)[dim])
    return Rule(
        (source, (new,) if shape(operands(node)[1]) else ()),
        (replaced(source, dim, new),),
        letters.sizes,
        whole=frozenset(source[dim]),
        linear=UNARY,
    )


def index(node: Node) -> Rule | str:
    """``x[i, :, j]`` with tensor indices: indexed dimensions are whole, the others pass.

    The broadcast shape of the indices stands where the first index stood if the indices are
    adjacent, in front otherwise (as in numpy); boolean indices have no static shape and are refused.
    """
    source, *indices = operands(node)
    if any(_masks(i) for i in indices):
        return "boolean or byte indices give a data-dependent shape"
    letters = Letters()
    dims = letters.dims(shape(source))
    found = _indexed(node, dims, indices, letters)
    inputs = (dims, *(aligned(shape(i), found.spread) for i in indices))
    return Rule(inputs, (found.result,), letters.sizes, whole=letters_of(found.gone), linear=UNARY)


def index_put(node: Node) -> Rule | str:
    """``x[i, :, j] = v``: indexed dimensions are whole, the others pass; so do indices that accumulate.

    Linear in x and v together. Where v is added, a divided index leaves a sum in which x counts once.
    """
    source, *indices, values = operands(node)
    if any(_masks(i) for i in indices):
        return "boolean or byte indices give a data-dependent shape"
    letters = Letters()
    dims = letters.dims(shape(source))
    found = _indexed(node, dims, indices, letters)
    inputs = (dims, *(aligned(shape(i), found.spread) for i in indices), aligned(shape(values), found.result))
    adds = bool(option(node, "accumulate", False))
    spread = letters_of(found.spread)
    return Rule(
        inputs,
        (dims,),
        letters.sizes,
        whole=letters_of(found.gone) | (frozenset() if adds else spread),
        reduce=dict.fromkeys(sorted(spread), "sum") if adds else {},
        linear=(frozenset({0, len(indices) + 1}),),
        once=frozenset({0} if adds else ()),
    )


class _Indexed:
    """What ``x[i, :, j]`` is made of: the indexed dimensions, the indices' own, and the result's."""

    def __init__(self, gone: list[Dim], spread: Labels, result: Labels) -> None:
        self.gone, self.spread, self.result = gone, spread, result


def _indexed(node: Node, dims: Labels, indices: list[Node], letters: Letters) -> _Indexed:
    where = [d for d, i in enumerate(option(node, "indices")) if i is not None]
    spread = broadcast_dims([shape(i) for i in indices], letters)
    kept = [d for i, d in enumerate(dims) if i not in where]
    adjacent = where == list(range(where[0], where[-1] + 1))
    at = where[0] if adjacent else 0
    return _Indexed([dims[d] for d in where], spread, (*kept[:at], *spread, *kept[at:]))


def _masks(index: Node) -> bool:
    return bool(index.meta["val"].dtype.itemsize == 1)


def gather(node: Node) -> Rule | str:
    """gather: pointwise but along its dimension, where ranks that lack what is asked for have zeros.

    The index may be divided anywhere. It may be smaller than the source in other dimensions, which are whole.
    """
    source, picked = (shape(o) for o in operands(node))
    if len(source) != len(picked) or not source:
        return "operands differ in rank"
    letters = Letters()
    dim = dim_of(node, len(source))
    found = letters.dims(picked)
    inside = tuple(found[d] if s == picked[d] and d != dim else letters.dim(s) for d, s in enumerate(source))
    cropped = [d for d in range(len(source)) if d != dim and source[d] != picked[d]]
    return Rule(
        (inside, found),
        (found,),
        letters.sizes,
        whole=letters_of([*(inside[d] for d in cropped), *(found[d] for d in cropped)]),
        reduce=dict.fromkeys(inside[dim], "sum"),
        linear=UNARY,
        localize="pick",
    )


def scatter(node: Node) -> Rule | str:
    """scatter, scatter_add, scatter_reduce: whole along the dimension of x, pointwise elsewhere.

    What is added may be divided along its dimension: that leaves a sum in which x counts once.
    """
    into, picked, *source = (shape(o) for o in operands(node))
    if len({len(into), len(picked), *map(len, source)}) > 1 or not into:
        return "operands differ in rank"
    letters = Letters()
    dim = dim_of(node, len(into))
    adds = _adds(node)
    found = letters.dims(picked)
    whole: set[str] = set()

    def labels(sizes: tuple[Size, ...], shares_dim: bool) -> Labels:
        out = []
        for d, size in enumerate(sizes):
            shared = size == picked[d] and (d != dim or shares_dim)
            out.append(found[d] if shared else letters.dim(size))
            if not shared:
                whole.update(out[-1] + found[d])
        return tuple(out)

    into_labels = labels(into, False)
    source_labels = [labels(s, True) for s in source]
    if adds:
        whole -= {letter for letter in found[dim] if all(s[dim] == picked[dim] for s in source)}
    return Rule(
        (into_labels, found, *source_labels),
        (into_labels,),
        letters.sizes,
        whole=frozenset(whole),
        reduce=dict.fromkeys(found[dim], "sum") if adds and not whole & set(found[dim]) else {},
        linear=(frozenset({0, 2}),) if source and _linear(node) else (),
        once=frozenset({0} if adds else ()),
    )


def _adds(node: Node) -> bool:
    """Whether scattered values are added to those that are there."""
    if op_name(node) in ("scatter_add", "index_add"):
        return True
    return option(node, "reduce", "") == "sum" and bool(option(node, "include_self", True))


def _linear(node: Node) -> bool:
    return option(node, "reduce", "sum") == "sum"


def scatter_rows(node: Node) -> Rule:
    """index_add, index_copy: rows of a whole dimension are added or replaced."""
    letters, into = labelled(node)
    dim = dim_of(node, len(into))
    rows = letters.dim(shape(operands(node)[1])[0] if shape(operands(node)[1]) else 1)
    adds = _adds(node)
    picked = (rows,) if shape(operands(node)[1]) else ()
    return Rule(
        (into, picked, replaced(into, dim, rows)),
        (into,),
        letters.sizes,
        whole=frozenset(into[dim] + (() if adds else rows)),
        reduce=dict.fromkeys(rows, "sum") if adds else {},
        linear=(frozenset({0, 2}),),
        once=frozenset({0} if adds else ()),
    )


def masked_scatter(node: Node) -> Rule | str:
    """``masked_scatter(x, mask, rows)``: where a mask chooses whole rows, what is in a row passes."""
    x, mask, rows = (shape(o) for o in operands(node))
    last = zip(reversed(x), reversed(rows), chain(reversed(mask), repeat(1)), strict=False)
    inside = len(list(takewhile(lambda sizes: sizes[0] == sizes[1] and sizes[2] == 1, last)))
    if not inside:
        return "where a value goes depends on all mask bits before it"
    letters = Letters()
    row = letters.dims(x[-inside:])
    ones = min(inside, len(mask))
    lead, chosen, given = map(letters.dims, (x[:-inside], mask[: len(mask) - ones], rows[:-inside]))
    return Rule(
        ((*lead, *row), (*chosen, *((),) * ones), (*given, *row)),
        ((*lead, *row),),
        letters.sizes,
        whole=letters_of((*lead, *chosen, *given)),
        linear=(frozenset({0, 2}),),
    )


def fill_rows(node: Node) -> Rule:
    """index_fill: rows of a whole dimension get one value."""
    letters, into = labelled(node)
    dim = dim_of(node, len(into))
    others = [letters.dims(shape(o)) for o in operands(node)[1:]]
    whole = frozenset(into[dim]) | letters_of(d for o in others for d in o)
    zeros = option(node, "value") == 0
    linear = (frozenset({0, 2}),) if len(others) > 1 else UNARY if zeros else ()
    return Rule((into, *others), (into,), letters.sizes, whole=whole, linear=linear)


def slice_scatter(node: Node) -> Rule:
    """``slice_scatter(x, part)``: the dimension is whole; linear in both together."""
    letters = Letters()
    source, part = (shape(o) for o in operands(node))
    dim = dim_of(node, len(source))
    dims = letters.dims(source)
    inner = letters.dim(part[dim])
    return Rule(
        (dims, replaced(dims, dim, inner)),
        (dims,),
        letters.sizes,
        whole=frozenset(dims[dim] + inner),
        linear=(frozenset({0, 1}),),
    )


def select_scatter(node: Node) -> Rule:
    """``select_scatter(x, row)``: like ``slice_scatter`` for one position."""
    letters, dims = labelled(node)
    dim = dim_of(node, len(dims))
    return Rule(
        (dims, without(dims, dim)),
        (dims,),
        letters.sizes,
        whole=frozenset(dims[dim]),
        linear=(frozenset({0, 1}),),
    )

"""Rules of operators that pick, join or place parts: the dimension they work on is whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import Node

from .rule import (
    UNARY,
    Dim,
    Labels,
    Letters,
    Rule,
    Size,
    aligned,
    divide,
    letters_of,
    op_name,
    operands,
    option,
    results,
    shape,
    sizes_of,
)  # fmt: skip


def _dim(node: Node, rank: int, name: str = "dim") -> int:
    return int(option(node, name, 0)) % rank


def _except(sizes: Sequence[Size], dims: Iterable[int], letters: Letters) -> Labels:
    """Fresh labels for all dimensions but some."""
    left_out = set(dims)
    return letters.dims([1 if d in left_out else s for d, s in enumerate(sizes)])


def _at(labels: Labels, dim: int, new: Dim) -> Labels:
    """Labels with one dimension replaced."""
    return (*labels[:dim], new, *labels[dim + 1 :])


def _without(labels: Labels, dim: int) -> Labels:
    return labels[:dim] + labels[dim + 1 :]


def slice_(node: Node) -> Rule:
    """A slice; one with a step that covers the dimension evenly divides its major factor.

    ``x[..., ::2]`` on a dimension ``(f 2)`` keeps ``f``: interleaved packings are divided by ``f``.
    """
    letters = Letters()
    source, target = shape(operands(node)[0]), shape(node)
    dim = _dim(node, len(source))
    step = option(node, "step", 1)
    others = _except(source, [dim], letters)
    old: Dim
    new: Dim
    if source[dim] == target[dim]:
        old = new = letters.dim(source[dim])
        whole: Dim = ()
    elif step > 1 and divide(source[dim], step) == target[dim]:
        new, whole = letters.dim(target[dim]), letters.dim(step)
        old = new + whole
    else:
        old, new = letters.dim(source[dim]), letters.dim(target[dim])
        whole = old + new
    return Rule(
        (_at(others, dim, old),),
        (_at(others, dim, new),),
        letters.sizes,
        whole=frozenset(whole),
        linear=UNARY,
    )


def select(node: Node) -> Rule:
    """``x[:, i]``: the dimension goes."""
    letters = Letters()
    source = letters.dims(shape(operands(node)[0]))
    dim = _dim(node, len(source))
    return Rule(
        (source,), (_without(source, dim),), letters.sizes, whole=frozenset(source[dim]), linear=UNARY
    )


def unbind(node: Node) -> Rule:
    """``unbind``: all selections along one dimension."""
    letters = Letters()
    source = letters.dims(shape(operands(node)[0]))
    dim = _dim(node, len(source))
    outputs = tuple(_without(source, dim) for _ in results(node))
    return Rule((source,), outputs, letters.sizes, whole=frozenset(source[dim]), linear=UNARY)


def split(node: Node) -> Rule:
    """split, split_with_sizes, chunk: several results, the dimension whole.

    Equal parts are ``(parts size)``, and ``size`` may be divided: every rank then has its share of
    each part. That is how equal packed segments stay packed.
    """
    letters = Letters()
    source = shape(operands(node)[0])
    dim = _dim(node, len(source))
    parts = [sizes_of(r)[dim] for r in results(node)]
    others = _except(source, [dim], letters)
    if len(set(parts)) == 1:
        part, count = letters.dim(parts[0]), letters.dim(len(parts))
        old, new, whole = count + part, [part for _ in parts], count
    else:
        old, new = letters.dim(source[dim]), [letters.dim(p) for p in parts]
        whole = old + tuple(letter for part in new for letter in part)
    return Rule(
        (_at(others, dim, old),),
        tuple(_at(others, dim, part) for part in new),
        letters.sizes,
        whole=frozenset(whole),
        linear=UNARY,
        localize="split",
    )


def cat(node: Node) -> Rule:
    """cat: the joined dimension is whole; all parts must be partial for a partial result."""
    letters = Letters()
    target = shape(node)
    dim = _dim(node, len(target))
    others = _except(target, [dim], letters)

    def labels(sizes: tuple[Size, ...]) -> Labels:
        # torch joins an empty vector to anything.
        return _at(others, dim, letters.dim(sizes[dim])) if len(sizes) == len(target) else letters.dims(sizes)

    inputs = tuple(labels(shape(o)) for o in operands(node))
    output = labels(target)
    return Rule(
        inputs,
        (output,),
        letters.sizes,
        whole=frozenset(letters.sizes) - letters_of(others),
        linear=(frozenset(range(len(inputs))),),
    )


def stack(node: Node) -> Rule:
    """stack: a new dimension of the result."""
    letters = Letters()
    ops, target = operands(node), shape(node)
    output = letters.dims(target)
    dim = _dim(node, len(target))
    return Rule(
        tuple(_without(output, dim) for _ in ops),
        (output,),
        letters.sizes,
        whole=frozenset(output[dim]),
        linear=(frozenset(range(len(ops))),),
    )


def pad(node: Node) -> Rule:
    """pad: padded dimensions are whole, even where as much is cut off on one side as is added on the other.

    A partial value may only be padded with zeros, or with values of its own.
    """
    letters = Letters()
    source, target = shape(operands(node)[0]), shape(node)
    pads = option(node, "pad")
    padded = {len(source) - 1 - i // 2 for i, amount in enumerate(pads) if amount != 0}
    others = _except(source, padded, letters)

    def labels(sizes: tuple[Size, ...]) -> Labels:
        return tuple(letters.dim(s) if d in padded else others[d] for d, s in enumerate(sizes))

    constant = option(node, "mode", "constant") == "constant"
    return Rule(
        (labels(source),),
        (labels(target),),
        letters.sizes,
        whole=frozenset(letters.sizes) - letters_of(others),
        linear=() if constant and option(node, "value", 0) != 0 else UNARY,
        filled=not constant,
    )


def unfold(node: Node) -> Rule:
    """``x.unfold(dim, size, step)``: windows of a whole dimension, their contents behind all others."""
    letters = Letters()
    source, target = shape(operands(node)[0]), shape(node)
    dim = _dim(node, max(len(source), 1), "dimension")
    others = _except(source, [dim], letters)
    old, windows, inside = letters.dims((source[dim], target[dim], target[-1]))
    return Rule(
        (_at(others, dim, old),),
        ((*_at(others, dim, windows), inside),),
        letters.sizes,
        whole=frozenset(old + windows + inside),
        linear=UNARY,
    )


def diagonal(node: Node) -> Rule:
    """``diagonal``: two whole dimensions become one behind all others."""
    letters = Letters()
    source = letters.dims(shape(operands(node)[0]))
    pair = sorted(_dim(node, len(source), name) for name in ("dim1", "dim2"))
    behind = letters.dim(shape(node)[-1])
    target = (*_without(_without(source, pair[1]), pair[0]), behind)
    whole = letters_of([source[d] for d in pair]) | frozenset(behind)
    return Rule((source,), (target,), letters.sizes, whole=whole, linear=UNARY)


def meshgrid(node: Node) -> Rule:
    """``meshgrid``: every result has all the letters, every operand one of them."""
    letters = Letters()
    order = [0, 1] if option(node, "indexing", "ij") == "ij" else [1, 0]
    sizes = shape(node)
    full = letters.dims(sizes)
    ops = operands(node)
    places = [order[i] if i < 2 and len(ops) > 1 else i for i in range(len(ops))]
    inputs = tuple((full[p],) if shape(o) else () for p, o in zip(places, ops, strict=True))
    return Rule(inputs, tuple(full for _ in ops), letters.sizes)


# With indices.


def index_select(node: Node) -> Rule:
    """index_select: the dimension is replaced by the index's."""
    letters = Letters()
    source = letters.dims(shape(operands(node)[0]))
    dim = _dim(node, len(source))
    new = letters.dim(shape(node)[dim])
    return Rule(
        (source, (new,)), (_at(source, dim, new),), letters.sizes, whole=frozenset(source[dim]), linear=UNARY
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
    shapes = [shape(i) for i in indices]
    width = max(map(len, shapes))
    padded = [(1,) * (width - len(s)) + s for s in shapes]
    spread = letters.dims([next((s for s in sizes if s != 1), 1) for sizes in zip(*padded, strict=True)])
    kept = [d for i, d in enumerate(dims) if i not in where]
    adjacent = where == list(range(where[0], where[-1] + 1))
    at = where[0] if adjacent else 0
    return _Indexed([dims[d] for d in where], spread, (*kept[:at], *spread, *kept[at:]))


def _masks(index: Node) -> bool:
    return bool(index.meta["val"].dtype.itemsize == 1)


def gather(node: Node) -> Rule | str:
    """gather: whole along the source's dimension, pointwise elsewhere; the index may be divided anywhere.

    The index may be smaller than the source in the other dimensions; such ones are whole too.
    """
    source, picked = (shape(o) for o in operands(node))
    if len(source) != len(picked) or not source:
        return "operands differ in rank"
    letters = Letters()
    dim = _dim(node, len(source))
    found = letters.dims(picked)
    inside = tuple(found[d] if s == picked[d] and d != dim else letters.dim(s) for d, s in enumerate(source))
    cropped = {d for d in range(len(source)) if d != dim and source[d] != picked[d]}
    whole = letters_of(inside) - letters_of(found) | letters_of(found[d] for d in cropped)
    return Rule((inside, found), (found,), letters.sizes, whole=whole, linear=UNARY)


_ADDED = {"sum": "sum", "amax": "max", "amin": "min"}


def scatter(node: Node) -> Rule | str:
    """scatter, scatter_add, scatter_reduce: whole along the dimension of x, pointwise elsewhere.

    What is added may be divided along its dimension: that leaves a sum in which x counts once.
    """
    into, picked, *source = (shape(o) for o in operands(node))
    if len({len(into), len(picked), *map(len, source)}) > 1 or not into:
        return "operands differ in rank"
    letters = Letters()
    dim = _dim(node, len(into))
    how = _added(node)
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
    if how:
        whole -= {letter for letter in found[dim] if all(s[dim] == picked[dim] for s in source)}
    return Rule(
        (into_labels, found, *source_labels),
        (into_labels,),
        letters.sizes,
        whole=frozenset(whole),
        reduce=dict.fromkeys(found[dim], how) if how and not whole & set(found[dim]) else {},
        linear=(frozenset({0, 2}),) if source and how in ("", "sum") and _linear(node) else (),
        once=frozenset({0}) if how == "sum" else frozenset(),
    )


def _added(node: Node) -> str:
    """The reduction by which scattered values meet those that are there, if a collective does it."""
    if op_name(node) in ("scatter_add", "index_add"):
        return "sum"
    return _ADDED.get(option(node, "reduce", ""), "") if option(node, "include_self", True) else ""


def _linear(node: Node) -> bool:
    return option(node, "reduce", "sum") == "sum"


def scatter_rows(node: Node) -> Rule:
    """index_add, index_copy: rows of a whole dimension are added or replaced."""
    letters = Letters()
    into = letters.dims(shape(operands(node)[0]))
    dim = _dim(node, len(into))
    rows = letters.dim(shape(operands(node)[1])[0] if shape(operands(node)[1]) else 1)
    adds = _added(node) == "sum"
    picked = (rows,) if shape(operands(node)[1]) else ()
    return Rule(
        (into, picked, _at(into, dim, rows)),
        (into,),
        letters.sizes,
        whole=frozenset(into[dim] + (() if adds else rows)),
        reduce=dict.fromkeys(rows, "sum") if adds else {},
        linear=(frozenset({0, 2}),),
        once=frozenset({0} if adds else ()),
    )


def fill_rows(node: Node) -> Rule:
    """index_fill: rows of a whole dimension get one value."""
    letters = Letters()
    into = letters.dims(shape(operands(node)[0]))
    dim = _dim(node, len(into))
    others = [letters.dims(shape(o)) for o in operands(node)[1:]]
    whole = frozenset(into[dim]) | letters_of(d for o in others for d in o)
    zeros = option(node, "value") == 0
    linear = (frozenset({0, 2}),) if len(others) > 1 else UNARY if zeros else ()
    return Rule((into, *others), (into,), letters.sizes, whole=whole, linear=linear)


def slice_scatter(node: Node) -> Rule:
    """``slice_scatter(x, part)``: the dimension is whole; linear in both together."""
    letters = Letters()
    source, part = (shape(o) for o in operands(node))
    dim = _dim(node, len(source))
    dims = letters.dims(source)
    inner = letters.dim(part[dim])
    return Rule(
        (dims, _at(dims, dim, inner)),
        (dims,),
        letters.sizes,
        whole=frozenset(dims[dim] + inner),
        linear=(frozenset({0, 1}),),
    )


def select_scatter(node: Node) -> Rule:
    """``select_scatter(x, row)``: like ``slice_scatter`` for one position."""
    letters = Letters()
    dims = letters.dims(shape(operands(node)[0]))
    dim = _dim(node, len(dims))
    return Rule(
        (dims, _without(dims, dim)),
        (dims,),
        letters.sizes,
        whole=frozenset(dims[dim]),
        linear=(frozenset({0, 1}),),
    )

"""Rules of operators that pick, join or place parts: the dimension they work on is whole."""

from __future__ import annotations

from torch.fx import Node

from .rule import Dim, Labels, Letters, Rule, Size, argument, divide, operands, results, shape, sizes_of


def _dim(node: Node, index: int, name: str = "dim", default: int = 0, rank: int | None = None) -> int:
    rank = len(shape(operands(node)[0])) if rank is None else rank
    return int(argument(node, index, name, default)) % rank


def slice_(node: Node) -> Rule:
    """A slice; one with a step that covers the dimension evenly divides its major factor.

    ``x[..., ::2]`` on a dimension ``(f 2)`` keeps ``f``: interleaved packings are divided by ``f``.
    """
    letters = Letters()
    source, target = shape(operands(node)[0]), shape(node)
    dim = _dim(node, 1)
    step = argument(node, 4, "step", 1)
    dims = list(letters.dims([1 if i == dim else s for i, s in enumerate(source)]))
    new: list[Dim] = list(dims)
    whole: set[str] = set()
    if source[dim] == target[dim]:
        dims[dim] = new[dim] = () if source[dim] == 1 else (letters.new(source[dim]),)
    elif step > 1 and divide(source[dim], step) == target[dim]:
        major, minor = letters.new(target[dim]), letters.new(step)
        dims[dim], new[dim], whole = (major, minor), (major,), {minor}
    else:
        for labels, size in ((dims, source[dim]), (new, target[dim])):
            if size != 1:
                labels[dim] = (letters.new(size),)
                whole |= set(labels[dim])
    return Rule(
        (tuple(dims),), (tuple(new),), letters.sizes, whole=frozenset(whole), linear=(frozenset({0}),)
    )


def select(node: Node) -> Rule:
    """``x[:, i]``: the dimension goes."""
    letters = Letters()
    source = letters.dims(shape(operands(node)[0]))
    dim = _dim(node, 1)
    target = source[:dim] + source[dim + 1 :]
    return Rule(
        (source,), (target,), letters.sizes, whole=frozenset(source[dim]), linear=(frozenset({0}),)
    )


def split(node: Node) -> Rule:
    """split, split_with_sizes, chunk, unbind: several results, the dimension whole.

    Equal parts are ``(parts size)``, and ``size`` may be divided: every rank then has its share of
    each part. That is how equal packed segments stay packed.
    """
    letters = Letters()
    source = shape(operands(node)[0])
    unbind = len(sizes_of(results(node)[0])) == len(source) - 1
    dim = _dim(node, 1 if unbind else 2)
    parts = [1 if unbind else sizes_of(r)[dim] for r in results(node)]
    dims = list(letters.dims([1 if i == dim else s for i, s in enumerate(source)]))
    whole: set[str] = set()
    outputs: list[Labels] = []
    if len(set(parts)) == 1 and parts[0] != 1:
        part = letters.new(parts[0])
        count = () if len(parts) == 1 else (letters.new(len(parts)),)
        whole |= set(count)
        dims[dim] = (*count, part)
        outputs = [tuple((part,) if i == dim else d for i, d in enumerate(dims)) for _ in parts]
    else:
        dims[dim] = () if source[dim] == 1 else (letters.new(source[dim]),)
        whole |= set(dims[dim])
        for part_size in parts:
            new = () if part_size == 1 else (letters.new(part_size),)
            whole |= set(new)
            kept = [new if i == dim else d for i, d in enumerate(dims) if not (unbind and i == dim)]
            outputs.append(tuple(kept))
    return Rule(
        (tuple(dims),),
        tuple(outputs),
        letters.sizes,
        whole=frozenset(whole),
        linear=(frozenset({0}),),
        localize="split",
    )


def cat(node: Node) -> Rule:
    """cat: the joined dimension is whole; all parts must be partial for a partial result."""
    letters = Letters()
    ops, target = operands(node), shape(node)
    dim = _dim(node, 1, rank=len(target))
    common = list(letters.dims([1 if i == dim else s for i, s in enumerate(target)]))
    whole: set[str] = set()

    def labels(size: Size, empty: bool = False) -> Labels:
        letter = () if size == 1 else (letters.new(size),)
        whole.update(letter)
        return (letter,) if empty else tuple(letter if i == dim else d for i, d in enumerate(common))

    # Legacy: an empty 1-d tensor may be joined to anything (a cache begins so).
    sizes = [shape(o) for o in ops]
    inputs = tuple(labels(s[dim]) if len(s) == len(target) else labels(0, empty=True) for s in sizes)
    return Rule(
        inputs,
        (labels(target[dim]),),
        letters.sizes,
        whole=frozenset(whole),
        linear=(frozenset(range(len(ops))),),
    )


def stack(node: Node) -> Rule:
    """stack: a new dimension of the result."""
    letters = Letters()
    ops, target = operands(node), shape(node)
    dim = _dim(node, 1, rank=len(target))
    common = list(letters.dims([1 if i == dim else s for i, s in enumerate(target)]))
    new = () if target[dim] == 1 else (letters.new(target[dim]),)
    source = tuple(d for i, d in enumerate(common) if i != dim)
    out = tuple(new if i == dim else d for i, d in enumerate(common))
    return Rule(
        tuple(source for _ in ops),
        (out,),
        letters.sizes,
        whole=frozenset(new),
        linear=(frozenset(range(len(ops))),),
    )


def resized(node: Node) -> Rule | str:
    """pad, roll-like: dimensions whose size changes are whole, the others pass (constant fill is 0)."""
    letters = Letters()
    source, target = shape(operands(node)[0]), shape(node)
    if len(source) != len(target):
        return "the rank changes"
    old, new, whole = [], [], set()
    for a, b in zip(source, target, strict=True):
        if a == b:
            letter = () if a == 1 else (letters.new(a),)
            old.append(letter)
            new.append(letter)
            continue
        for size, labels in ((a, old), (b, new)):
            labels.append(() if size == 1 else (letters.new(size),))
            whole |= set(labels[-1])
    value = argument(node, 2 if len(node.args) < 4 else 3, "value", 0) or 0
    # A partial value may only be padded with zeros; a padding that adds nothing in a dimension of
    # unchanged size but shifts it (negative on one side) would need that dimension whole.
    pads = argument(node, 1, "pad", ())
    shifts = [i for i in range(0, len(pads), 2) if isinstance(pads[i], int) and pads[i] != 0]
    for i in shifts:
        whole |= set(old[len(old) - 1 - i // 2])
    return Rule(
        (tuple(old),),
        (tuple(new),),
        letters.sizes,
        whole=frozenset(whole),
        linear=(frozenset({0}),) if value == 0 else (),
    )


def roll(node: Node) -> Rule:
    """roll: rolled dimensions are whole (all, if none is named)."""
    letters = Letters()
    source = letters.dims(shape(operands(node)[0]))
    dims = argument(node, 2, "dims", ()) or range(len(source))
    whole = frozenset(letter for d in dims for letter in source[d])
    return Rule((source,), (source,), letters.sizes, whole=whole, linear=(frozenset({0}),))


def flip(node: Node) -> Rule:
    """flip: flipped dimensions are whole."""
    letters = Letters()
    source = letters.dims(shape(operands(node)[0]))
    whole = frozenset(letter for d in argument(node, 1, "dims") for letter in source[d])
    return Rule((source,), (source,), letters.sizes, whole=whole, linear=(frozenset({0}),))


def gather_scatter(node: Node) -> Rule | str:
    """gather, scatter, scatter_add, index_add-like: whole along their dimension, pointwise elsewhere.

    The index may be smaller than the source in the other dimensions; such ones are whole too.
    """
    letters = Letters()
    ops = operands(node)
    rank = len(shape(ops[0]))
    if any(len(shape(o)) != rank for o in ops):
        return "operands differ in rank"
    dim = _dim(node, 1)
    everything = [shape(o) for o in ops] + [shape(node)]
    shared: list[Dim] = []
    for d in range(rank):
        sizes = {s[d] for s in everything}
        shared.append((letters.new(sizes.pop()),) if d != dim and len(sizes) == 1 and 1 not in sizes else ())
    whole: set[str] = set()

    def labels(sizes: tuple[Size, ...]) -> Labels:
        out = []
        for d, size in enumerate(sizes):
            if shared[d] or size == 1:
                out.append(shared[d])
            else:
                out.append((letters.new(size),))
                whole.update(out[-1])
        return tuple(out)

    inputs = tuple(labels(shape(o)) for o in ops)
    return Rule(inputs, (labels(shape(node)),), letters.sizes, whole=frozenset(whole))


def index_select(node: Node) -> Rule:
    """index_select: the dimension is replaced by the index's."""
    letters = Letters()
    source, target = shape(operands(node)[0]), shape(node)
    dim = _dim(node, 1)
    dims = letters.dims(source)
    new = () if target[dim] == 1 else (letters.new(target[dim]),)
    return Rule(
        (dims, (new,)),
        (dims[:dim] + (new,) + dims[dim + 1 :],),
        letters.sizes,
        whole=frozenset(dims[dim] + new),
        linear=(frozenset({0}),),
    )


def index(node: Node) -> Rule | str:
    """``x[i, :, j]`` with tensor indices: indexed dimensions are whole, the others pass.

    The broadcast shape of the indices stands where the first index stood if the indices are
    adjacent, in front otherwise (as in numpy); boolean indices have no static shape and are refused.
    """
    letters = Letters()
    ops = operands(node)
    where = list(argument(node, 1, "indices"))
    indices = ops[1:]
    if any(not i.meta["val"].dtype.is_floating_point and i.meta["val"].dtype.itemsize == 1 for i in indices):
        return "boolean or byte indices give a data-dependent shape"
    source = letters.dims(shape(ops[0]))
    indexed = [d for d, i in enumerate(where) if i is not None]
    kept = [d for d in range(len(source)) if d not in indexed]
    target = shape(node)
    width = len(target) - len(kept)
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    at = indexed[0] if adjacent else 0
    spread = letters.dims(target[at : at + width])
    out = [source[d] for d in kept]
    out[at:at] = spread
    inputs: list[Labels] = [source]
    for i in indices:
        sizes = shape(i)
        pad = width - len(sizes)
        inputs.append(tuple(spread[pad + k] if s == target[at + pad + k] else () for k, s in enumerate(sizes)))
    return Rule(
        inputs=tuple(inputs),
        outputs=(tuple(out),),
        sizes=letters.sizes,
        whole=frozenset(letter for d in indexed for letter in source[d]),
        linear=(frozenset({0}),),
    )


def index_put(node: Node) -> Rule | str:
    """``x[i] = v`` on the leading dimensions: these are whole, trailing ones pass through all."""
    ops = operands(node)
    where = list(argument(node, 1, "indices"))
    if any(i is None for i in where):
        return "only leading dimensions may be indexed"
    letters = Letters()
    dims = letters.dims(shape(ops[0]))
    lead = len(where)
    whole = {letter for d in dims[:lead] for letter in d}

    def other(sizes: tuple[Size, ...], tail: Labels) -> Labels:
        out: list[Dim] = []
        for k, size in enumerate(sizes):
            from_end = len(sizes) - k
            if from_end <= len(tail):
                match = tail[-from_end]
                out.append(match if size != 1 else ())
            else:
                out.append(() if size == 1 else (letters.new(size),))
                whole.update(out[-1])
        return tuple(out)

    indices = [other(shape(i), ()) for i in ops[1:-1]]
    values = other(shape(ops[-1]), dims[lead:])
    return Rule((dims, *indices, values), (dims,), letters.sizes, whole=frozenset(whole))


def slice_scatter(node: Node) -> Rule:
    """``slice_scatter(x, part)``: the dimension is whole; linear in both together."""
    letters = Letters()
    source, part = (shape(o) for o in operands(node))
    dim = _dim(node, 2)
    dims = list(letters.dims(source))
    inner = () if part[dim] == 1 else (letters.new(part[dim]),)
    placed = tuple(inner if i == dim else d for i, d in enumerate(dims))
    return Rule(
        (tuple(dims), placed),
        (tuple(dims),),
        letters.sizes,
        whole=frozenset(dims[dim] + inner),
        linear=(frozenset({0, 1}),),
    )


def select_scatter(node: Node) -> Rule:
    """``select_scatter(x, row)``: like ``slice_scatter`` for one position."""
    letters = Letters()
    dims = letters.dims(shape(operands(node)[0]))
    dim = _dim(node, 2)
    return Rule(
        (dims, dims[:dim] + dims[dim + 1 :]),
        (dims,),
        letters.sizes,
        whole=frozenset(dims[dim]),
        linear=(frozenset({0, 1}),),
    )

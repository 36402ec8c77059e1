"""Rules of operators that cut, join or pad: the dimension they work on is whole."""

from __future__ import annotations

from torch.fx import Node

from tpcompile.ir.nodes import operands, option, results, shape
from tpcompile.ir.sizes import Size, divide, sizes_of

from .labels import dim_of, fresh_except, labelled, replaced, resized, without
from .rule import UNARY, Dim, Labels, Letters, Rule, letters_of


def slice_(node: Node) -> Rule:
    """A slice; one with a step that covers the dimension evenly divides its major factor.

    ``x[..., ::2]`` on a dimension ``(f 2)`` keeps ``f``: interleaved packings are divided by ``f``.
    """
    letters = Letters()
    source, target = shape(operands(node)[0]), shape(node)
    dim = dim_of(node, len(source))
    start, step = option(node, "start", 0), option(node, "step", 1)
    # A start counted from the end is another one where a rank has less.
    strided = step > 1 and isinstance(start, int) and start >= 0
    others = fresh_except(source, [dim], letters)
    old: Dim
    new: Dim
    if source[dim] == target[dim]:
        old = new = letters.dim(source[dim])
        whole: Dim = ()
    elif strided and divide(source[dim], step) == target[dim]:
        new, whole = letters.dim(target[dim]), letters.dim(step)
        old = new + whole
    else:
        old, new = letters.dim(source[dim]), letters.dim(target[dim])
        whole = old + new
    return Rule(
        (replaced(others, dim, old),),
        (replaced(others, dim, new),),
        letters.sizes,
        whole=frozenset(whole),
        linear=UNARY,
    )


def select(node: Node) -> Rule:
    """``x[:, i]``, and ``unbind``, all of them: the dimension goes."""
    letters, source = labelled(node)
    dim = dim_of(node, len(source))
    outputs = tuple(without(source, dim) for _ in results(node))
    return Rule((source,), outputs, letters.sizes, whole=frozenset(source[dim]), linear=UNARY)


def split(node: Node) -> Rule:
    """split, split_with_sizes, chunk: several results, the dimension whole.

    Equal parts are ``(parts size)``, and ``size`` may be divided: every rank then has its share of
    each part. That is how equal packed segments stay packed.
    """
    letters = Letters()
    source = shape(operands(node)[0])
    dim = dim_of(node, len(source))
    parts = [sizes_of(r)[dim] for r in results(node)]
    others = fresh_except(source, [dim], letters)
    if len(set(parts)) == 1:
        part, count = letters.dim(parts[0]), letters.dim(len(parts))
        old, new, whole = count + part, [part for _ in parts], count
    else:
        old, new = letters.dim(source[dim]), [letters.dim(p) for p in parts]
        whole = old + tuple(letter for part in new for letter in part)
    return Rule(
        (replaced(others, dim, old),),
        tuple(replaced(others, dim, part) for part in new),
        letters.sizes,
        whole=frozenset(whole),
        linear=UNARY,
        localize="split",
    )


def cat(node: Node) -> Rule:
    """cat: the joined dimension is whole; all parts must be partial for a partial result."""
    letters = Letters()
    target = shape(node)
    dim = dim_of(node, len(target))
    others = fresh_except(target, [dim], letters)

    def labels(sizes: tuple[Size, ...]) -> Labels:
        # torch joins an empty vector to anything.
        return (
            replaced(others, dim, letters.dim(sizes[dim]))
            if len(sizes) == len(target)
            else letters.dims(sizes)
        )

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
    dim = dim_of(node, len(target))
    return Rule(
        tuple(without(output, dim) for _ in ops),
        (output,),
        letters.sizes,
        whole=frozenset(output[dim]),
        linear=(frozenset(range(len(ops))),),
    )


def pad(node: Node) -> Rule:
    """pad: padded dimensions are whole, even where as much is cut off on one side as is added on the other.

    A partial value may only be padded with zeros, or with values of its own.
    """
    pads, last = option(node, "pad"), len(shape(node)) - 1
    constant = option(node, "mode", "constant") == "constant"
    linear = not constant or option(node, "value", 0) == 0
    padded = {last - i // 2 for i, amount in enumerate(pads) if amount != 0}
    return resized(node, padded, linear=linear, nonempty=not constant)


def unfold(node: Node) -> Rule:
    """``x.unfold(dim, size, step)``: windows of a whole dimension, their contents behind all others."""
    letters = Letters()
    source, target = shape(operands(node)[0]), shape(node)
    dim = dim_of(node, max(len(source), 1), "dimension")
    others = fresh_except(source, [dim], letters)
    old, windows, inside = letters.dims((source[dim], target[dim], target[-1]))
    return Rule(
        (replaced(others, dim, old),),
        ((*replaced(others, dim, windows), inside),),
        letters.sizes,
        whole=frozenset(old + windows + inside),
        linear=UNARY,
    )


def diagonal(node: Node) -> Rule:
    """``diagonal``: two whole dimensions become one behind all others."""
    letters, source = labelled(node)
    pair = sorted(dim_of(node, len(source), name) for name in ("dim1", "dim2"))
    behind = letters.dim(shape(node)[-1])
    target = (*without(without(source, pair[1]), pair[0]), behind)
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

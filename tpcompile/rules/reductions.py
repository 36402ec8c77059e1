"""Rules of reductions and of operators that need a whole dimension (softmax, norms, sorts, scans)."""

from __future__ import annotations

from torch.fx import Node

from .pointwise import op_name
from .rule import Labels, Letters, Rule, argument, operands, results, shape, sizes_of

_REDUCE = {"sum": "sum", "mean": "sum", "amax": "max", "amin": "min", "max": "", "min": ""}


def _dims(node: Node, index: int = 1) -> list[int]:
    rank = len(shape(operands(node)[0]))
    dim = argument(node, index, "dim")
    if dim is None or dim == []:
        return list(range(rank))
    return [d % rank for d in (dim if isinstance(dim, list | tuple) else [dim])]


def reduction(node: Node) -> Rule:
    """sum, mean, amax, amin over given dimensions: a divided one leaves a partial result.

    A divided ``mean`` becomes a local sum divided by the whole count (uneven parts count right).
    Other reductions (var, argmax, prod, ...) want their dimensions whole.
    """
    letters = Letters()
    source = letters.dims(shape(operands(node)[0]))
    dims = set(_dims(node))
    keep = len(sizes_of(results(node)[0])) == len(source)
    target: Labels = tuple(
        () if i in dims else d for i, d in enumerate(source) if keep or i not in dims
    )
    name = op_name(node)
    gone = [letter for i in dims for letter in source[i]]
    how = _REDUCE.get(name, "")
    return Rule(
        inputs=(source,),
        outputs=tuple(target for _ in results(node)),
        sizes=letters.sizes,
        whole=frozenset() if how else frozenset(gone),
        reduce=dict.fromkeys(gone, how) if how else {},
        linear=(frozenset({0}),) if name in ("sum", "mean") else (),
        localize="mean" if name == "mean" else "",
    )


def whole_dim(index: int, name: str = "dim", default: int | None = None) -> object:
    """A maker of rules for operators of one tensor that keep its shape and want one dimension whole."""

    def rule(node: Node) -> Rule:
        letters = Letters()
        source = letters.dims(shape(operands(node)[0]))
        dim = argument(node, index, name, default)
        if dim is None:
            dim = -1
        return Rule(
            inputs=tuple(source for _ in operands(node)),
            outputs=tuple(source for _ in results(node)),
            sizes=letters.sizes,
            whole=frozenset(source[dim]) if source else frozenset(),
            linear=(frozenset({0}),) if op_name(node) in ("cumsum", "flip", "roll") else (),
        )

    return rule


def changed_dim(index: int, name: str = "dim", default: int = -1) -> object:
    """Like ``whole_dim`` for operators that change the size of that dimension (topk, diff)."""

    def rule(node: Node) -> Rule:
        letters = Letters()
        source = letters.dims(shape(operands(node)[0]))
        dim = argument(node, index, name, default) % len(source)
        outputs = []
        whole = set(source[dim])
        for result in results(node):
            size = sizes_of(result)[dim]
            new = () if size == 1 else (letters.new(size),)
            whole |= set(new)
            outputs.append(source[:dim] + (new,) + source[dim + 1 :])
        inputs = [source]
        for other in operands(node)[1:]:  # what diff puts before and behind
            size = shape(other)[dim]
            new = () if size == 1 else (letters.new(size),)
            whole |= set(new)
            inputs.append(source[:dim] + (new,) + source[dim + 1 :])
        return Rule(tuple(inputs), tuple(outputs), letters.sizes, whole=frozenset(whole))

    return rule


def layer_norm(node: Node) -> Rule:
    """The normalised dimensions are whole; weight and bias go with them."""
    letters = Letters()
    ops = operands(node)
    source = letters.dims(shape(ops[0]))
    normalised = len(argument(node, 1, "normalized_shape"))
    tail = source[len(source) - normalised :]
    outputs: list[Labels] = [source]
    for extra in results(node)[1:]:
        outputs.append(tuple(d if s != 1 else () for d, s in zip(source, sizes_of(extra), strict=True)))
    return Rule(
        inputs=(source, *(tail for _ in ops[1:])),
        outputs=tuple(outputs),
        sizes=letters.sizes,
        whole=frozenset(letter for dim in tail for letter in dim),
    )


def group_norm(node: Node) -> Rule | str:
    """``group_norm(x[b, (g c), ...], groups)``: groups may be divided, channels within one not."""
    letters = Letters()
    ops = operands(node)
    batch, channels, *space = shape(ops[0])
    groups = argument(node, 1, "num_groups")
    b = letters.dims([batch])[0]
    g = letters.dims([groups])[0]
    c = letters.dims([channels // groups])[0]
    rest = letters.dims(space)
    source = (b, g + c, *rest)
    return Rule(
        inputs=(source, *((g + c,) for _ in ops[1:])),
        outputs=(source,),
        sizes=letters.sizes,
        whole=frozenset(c + tuple(letter for d in rest for letter in d)),
        localize="group_norm",
    )


def batch_norm(node: Node) -> Rule:
    """Inference-mode batch norm: per channel, everything else follows."""
    letters = Letters()
    ops = operands(node)
    source = letters.dims(shape(ops[0]))
    return Rule(
        inputs=(source, *((source[1],) for _ in ops[1:])),
        outputs=(source,),
        sizes=letters.sizes,
        whole=frozenset(),
    )

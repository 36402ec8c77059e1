"""Rules of matmul-like operators whose form depends on shapes: matmul, attention, convolution, einsum."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

from torch.fx import Node

from tpcompile.ir.nodes import op_name, operands, option, results, shape
from tpcompile.ir.sizes import Size, divide, sizes_of

from .labels import broadcast_dims
from .notation import instantiate, parse_row
from .rule import UNARY, Labels, Letters, Rule, aligned, letters_of

EACH = (frozenset({0}), frozenset({1}))
"""``linear`` of a product of two operands."""


def matmul(node: Node) -> Rule:
    """``... i k, ... k n -> ... i n`` with torch's broadcasting and one-dimensional operands."""
    a, b = (shape(o) for o in operands(node))
    letters = Letters()
    k = letters.dim(a[-1])
    rows = letters.dims(a[-2:-1])  # none for a vector
    columns = letters.dims(b[-1:] if len(b) > 1 else ())
    lead_a, lead_b = (a[:-2], b[:-2])
    batch = broadcast_dims([lead_a, lead_b], letters)
    return Rule(
        ((*aligned(lead_a, batch), *rows, k), (*aligned(lead_b, batch), k, *columns)),
        ((*batch, *rows, *columns),),
        letters.sizes,
        reduce=dict.fromkeys(k, "sum"),
        linear=EACH,
        contraction=True,
    )


def triangular_solve(node: Node) -> Rule:
    """``a[... n n], b[... n k] -> x[... n k]`` with ``a @ x = b``; ``x @ a = b`` where it is not ``left``."""
    a, b = (shape(o) for o in operands(node))
    letters = Letters()
    left = option(node, "left", True)
    rows, columns = letters.dims(a[-2:])
    free = letters.dim(b[-1 if left else -2])
    batch = broadcast_dims([a[:-2], b[:-2]], letters)
    solved = (rows, free) if left else (free, columns)
    return Rule(
        ((*aligned(a[:-2], batch), rows, columns), (*aligned(b[:-2], batch), *solved)),
        ((*batch, *solved),),
        letters.sizes,
        whole=frozenset((*rows, *columns)),
        linear=(frozenset({1}),),
    )


def scaled_matmul(node: Node) -> Rule | str:
    """``(a[i k] * s) @ (b[k n] * t) + bias[n]`` of eight bits, with scales of all, of rows and of columns."""
    if option(node, "scale_result") is not None:
        return "the result is rounded to eight bits"
    letters = Letters()
    rows, columns = shape(node)
    (i, k), n = letters.dims(shape(operands(node)[0])), letters.dim(columns)
    beside = [shape(o) for o in operands(node)[2:]]
    if any(math.prod(s) != 1 and s not in ((rows, 1), (1, columns), (columns,)) for s in beside):
        return "its scales are those of blocks"
    return Rule(
        ((i, k), (k, n), *(aligned(sizes, (i, n)) for sizes in beside)),
        ((i, n),),
        letters.sizes,
        reduce=dict.fromkeys(k, "sum"),
        once=frozenset({4}),
        contraction=True,
    )


def add_matmul(node: Node) -> Rule:
    """``c + a[... i k] @ m[... k n]`` (addmm, baddbmm, addmv): c broadcasts and counts once under a sum."""
    c, a, m = (shape(o) for o in operands(node))
    letters = Letters()
    *lead, k = letters.dims(a)
    columns = letters.dims(m[-1:] if len(m) > 1 else ())
    out = (*lead, *columns)
    return Rule(
        (aligned(c, out), (*lead, k), (*lead[:-1], k, *columns)),
        (out,),
        letters.sizes,
        reduce=dict.fromkeys(k, "sum"),
        linear=(frozenset({0, 1}), frozenset({0, 2})),
        once=frozenset({0}),
        contraction=True,
    )


def attention(node: Node) -> Rule | str:
    """Scaled dot product attention; with ``enable_gqa`` the query heads are ``(groups repeats)``.

    Keys, their features and a causal mask's queries are whole: softmax and scale need them.
    """
    q, k, v, *masks = (shape(o) for o in operands(node))
    letters = Letters()
    heads = _heads(q, k, v, letters)
    if heads is None:
        return "query heads are not a multiple of key heads"
    heads_q, heads_k = heads
    length, keys, features, values = letters.dims((q[-2], k[-2], q[-1], v[-1]))
    lead = broadcast_dims([q[:-3], k[:-3], v[:-3]], letters)
    rows = (*lead, *heads_q, length)
    causal = bool(option(node, "is_causal", False))
    return Rule(
        (
            (*aligned(q[:-3], lead), *heads_q, length, features),
            (*aligned(k[:-3], lead), *heads_k, keys, features),
            (*aligned(v[:-3], lead), *heads_k, keys, values),
            *(aligned(mask, (*rows, keys)) for mask in masks),
        ),
        ((*rows, values),),
        letters.sizes,
        whole=frozenset(keys + features + length * causal),
        linear=(frozenset({2}),),
        contraction=True,
        localize="attention",
    )


def _heads(
    q: tuple[Size, ...], k: tuple[Size, ...], v: tuple[Size, ...], letters: Letters
) -> tuple[Labels, Labels] | None:
    """Labels of the query's and of the key's head dimension, none where there are no heads."""
    if len(q) < 3:
        return (), ()
    if len(k) != len(q) or len(v) != len(q) or k[-3] != v[-3]:
        return None
    repeats = divide(q[-3], k[-3])
    if repeats is None:
        return None
    group = letters.dim(k[-3])
    return (group + letters.dim(repeats),), (group,)


def convolution(node: Node) -> Rule | str:
    """``x[b (g i) ...], w[(g o) i ...] -> [b (g o) ...]``: groups, inputs and outputs may be divided."""
    x, w, *bias = (shape(o) for o in operands(node))
    out = sizes_of(results(node)[0])
    if len(x) != len(w):
        return "the input has no batch dimension"
    groups = option(node, "groups", 1)
    per_in, per_out = divide(x[1], groups), divide(out[1], groups)
    if per_in is None or per_out is None:
        return "groups do not divide the channels"
    letters = Letters()
    batch, g, i, o = letters.dims((x[0], groups, per_in, per_out))
    inside, kernel, outside = (letters.dims(s[2:]) for s in (x, w, out))
    transposed = option(node, "transposed", op_name(node).startswith("conv_transpose"))
    weight = (g + i, o, *kernel) if transposed else (g + o, i, *kernel)
    return Rule(
        ((batch, g + i, *inside), weight, *((g + o,) for _ in bias)),
        ((batch, g + o, *outside),),
        letters.sizes,
        whole=letters_of((*inside, *kernel, *outside)),
        reduce=dict.fromkeys(i, "sum"),
        linear=(frozenset({0, 2} if bias else {0}),),
        once=frozenset({2} if bias else ()),
        nonempty=True,
        contraction=True,
        localize="groups",
    )


def embedding(node: Node) -> Rule:
    """``v d, ... -> ... d``: a divided vocabulary is looked up where it is, elsewhere there are zeros."""
    letters = Letters()
    table, picked = (shape(o) for o in operands(node))
    vocabulary, features, *places = letters.dims((*table, *picked))
    # Gradients that are divided by how often a row occurs need to see all rows, and all that ask for them.
    divisible = not option(node, "scale_grad_by_freq", False)
    return Rule(
        ((vocabulary, features), tuple(places)),
        ((*places, features),),
        letters.sizes,
        whole=frozenset() if divisible else frozenset(letters.sizes) - frozenset(features),
        reduce=dict.fromkeys(vocabulary, "sum") if divisible else {},
        contraction=True,
        localize="lookup",
    )


def embedding_bag(node: Node) -> Rule | str:
    """Sums or means of looked up rows: columns may be divided; what else it returns is about the bags."""
    if option(node, "mode", 0) == 2:
        return "a maximum over the rows of a bag"
    letters = Letters()
    (vocabulary, features), *others = (letters.dims(shape(o)) for o in operands(node))
    result, *about = (letters.dims(sizes_of(r)) for r in results(node))
    return Rule(
        ((vocabulary, features), *others),
        ((result[0], features), *about),
        letters.sizes,
        whole=frozenset(letters.sizes) - frozenset(features),
        fixed=frozenset(range(1, 1 + len(about))),
        contraction=True,
    )


def spatial(node: Node) -> Rule:
    """Pooling and resampling: a batch, if there is one, and channels pass; the last dimensions are whole."""
    source, target = shape(operands(node)[0]), shape(node)
    letters = Letters()
    last = int(next(filter(str.isdigit, op_name(node))))  # how many, as in max_pool2d
    lead = letters.dims(source[:-last])
    old, new = letters.dims(source[-last:]), letters.dims(target[-last:])
    return Rule(
        ((*lead, *old),),
        tuple((*lead, *new) for _ in results(node)),
        letters.sizes,
        whole=letters_of(old + new),
        linear=() if "max" in op_name(node) else UNARY,
        nonempty=True,
    )


def einsum(node: Node) -> Rule | str:
    """An einsum is its own rule; repeated letters in one operand are refused.

    What only one of several operands has is summed before the others are multiplied, so it is whole: of
    summands with two signs, times infinity, ranks would make what is not a number.
    """
    shapes = [shape(o) for o in operands(node)]
    terms, right = _spelled_out(str(node.args[0]).replace(" ", ""), [len(s) for s in shapes])
    if any(len(set(t)) != len(t) for t in terms):
        return "a letter stands twice in one operand"
    once = sorted(c for c in set("".join(terms)) - set(right) if sum(c in term for term in terms) == 1)
    row = f"{', '.join(map(' '.join, terms))} -> {' '.join(right)}"
    row += "; linear " + "|".join(map(str, range(len(terms))))
    if len(terms) > 1:
        row += "; contraction" + (f"; whole {' '.join(once)}" if once else "")
    return instantiate(parse_row(row), shapes, [shape(node)])


def _spelled_out(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """An equation's terms and its result, with letters for ellipses, which are aligned from the right."""
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if not arrow:
        once = sorted(c for c in set(left) - set(".,") if left.count(c) == 1)
        right = ("..." if "..." in left else "") + "".join(once)
    spare = [c for c in string.ascii_letters if c not in equation]
    hidden = [
        rank - len(term.replace("...", "")) if "..." in term else 0
        for term, rank in zip(terms, ranks, strict=True)
    ]
    dots = "".join(spare[: max(hidden)])
    spelled = [
        term.replace("...", dots[len(dots) - count :]) for term, count in zip(terms, hidden, strict=True)
    ]
    return spelled, right.replace("...", dots)

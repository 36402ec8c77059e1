"""Rules of matmul-like operators whose form depends on shapes: matmul, attention, convolution, einsum."""

from __future__ import annotations

from torch.fx import Node

from .pointwise import op_name
from .rule import Dim, Labels, Letters, Rule, Size, argument, divide, operands, results, shape, sizes_of


def _broadcast_batch(shapes: list[tuple[Size, ...]], letters: Letters) -> list[Labels]:
    """Labels of leading dimensions that broadcast against each other."""
    width = max(map(len, shapes))
    full: list[Dim] = []
    for k in range(width):
        at = [s[k - width + len(s)] for s in shapes if k - width + len(s) >= 0]
        size = next((a for a in at if a != 1), 1)
        full.append(() if size == 1 else (letters.new(size),))
    return [
        tuple(() if size == 1 else full[width - len(s) + k] for k, size in enumerate(s)) for s in shapes
    ]


def matmul(node: Node) -> Rule | str:
    """``... i k, ... k n -> ... i n`` with torch's broadcasting and one-dimensional operands."""
    a, b = (shape(o) for o in operands(node))
    letters = Letters()
    k = letters.dims([a[-1]])[0]
    i = letters.dims([a[-2]])[0] if len(a) > 1 else None
    n = letters.dims([b[-1]])[0] if len(b) > 1 else None
    batch_a, batch_b = _broadcast_batch([a[:-2] if i is not None else (), b[:-2] if n is not None else ()], letters)
    longest = max((batch_a, batch_b), key=len)
    pad_a, pad_b = ((),) * (len(longest) - len(batch_a)), ((),) * (len(longest) - len(batch_b))
    batch = tuple(x or y for x, y in zip(pad_a + batch_a, pad_b + batch_b, strict=True))
    left = (*batch_a, i, k) if i is not None else (k,)
    right = (*batch_b, k, n) if n is not None else (k,)
    out = (*batch, *([i] if i is not None else []), *([n] if n is not None else []))
    return Rule(
        (left, right),
        (out,),
        letters.sizes,
        reduce=dict.fromkeys(k, "sum"),
        linear=(frozenset({0}), frozenset({1})) if operands(node)[0] is not operands(node)[1] else (),
        contraction=True,
    )


def baddbmm(node: Node) -> Rule | str:
    """``baddbmm(c, a[b i k], m[b k n])``: c broadcasts and counts once; alpha and beta scale."""
    c, a, b = (shape(o) for o in operands(node))
    letters = Letters()
    batch, i, k = letters.dims(a)
    n = letters.dims([b[2]])[0]
    out = (batch, i, n)
    addend = tuple(d if s != 1 else () for d, s in zip(out[3 - len(c) :], c, strict=True))
    return Rule(
        (addend, (batch, i, k), (batch, k, n)),
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
    ops = operands(node)
    q, k, v = (shape(o) for o in ops[:3])
    letters = Letters()
    heads_q, heads_k = (q[-3], k[-3]) if len(q) > 2 else (1, 1)
    repeats = divide(heads_q, heads_k)
    if repeats is None or heads_k != v[-3 if len(v) > 2 else 0] and len(v) > 2:
        return "query heads are no multiple of key heads"
    group = letters.dims([heads_k])[0]
    repeat = letters.dims([repeats])[0]
    length, keys, features, values = (letters.dims([s])[0] for s in (q[-2], k[-2], q[-1], v[-1]))
    lead = _broadcast_batch([q[:-3], k[:-3], v[:-3]], letters)
    has_heads = len(q) > 2
    hq: Labels = (group + repeat,) if has_heads else ()
    hk: Labels = (group,) if has_heads else ()
    out = (*lead[0], *hq, length, values)
    inputs: list[Labels] = [
        (*lead[0], *hq, length, features),
        (*lead[1], *hk, keys, features),
        (*lead[2], *hk, keys, values),
    ]
    for mask in ops[3:]:
        sizes = shape(mask)
        full = (*lead[0], *hq, length, keys)[-len(sizes) :]
        inputs.append(tuple(d if s != 1 else () for d, s in zip(full, sizes, strict=True)))
    causal = bool(argument(node, 5, "is_causal", False))
    return Rule(
        tuple(inputs),
        (out,),
        letters.sizes,
        whole=frozenset(keys + features + (length if causal else ())),
        linear=(frozenset({2}),),
        contraction=True,
    )


def convolution(node: Node) -> Rule | str:
    """``x[b (g i) ...], w[(g o) i ...] -> [b (g o) ...]``: groups, inputs and outputs may be divided."""
    ops = operands(node)
    x, w = shape(ops[0]), shape(ops[1])
    general = op_name(node) == "convolution"
    transposed = bool(argument(node, 6, "transposed", False)) if general else op_name(node).startswith("conv_tr")
    groups = argument(node, 8 if general else (7 if transposed else 6), "groups", 1)
    out = sizes_of(results(node)[0])
    letters = Letters()
    batch = letters.dims([x[0]])[0]
    g = letters.dims([groups])[0]
    per_in, per_out = divide(x[1], groups), divide(out[1], groups)
    if per_in is None or per_out is None:
        return "groups do not divide the channels"
    i, o = letters.dims([per_in])[0], letters.dims([per_out])[0]
    spaces = [letters.dims(s[2:]) for s in (x, w, out)]
    weight = (g + i, o, *spaces[1]) if transposed else (g + o, i, *spaces[1])
    bias = ((g + o,),) if len(ops) > 2 else ()
    spatial = {letter for space in spaces for dim in space for letter in dim}
    return Rule(
        ((batch, g + i, *spaces[0]), weight, *bias),
        ((batch, g + o, *spaces[2]),),
        letters.sizes,
        whole=frozenset(spatial),
        reduce=dict.fromkeys(i, "sum"),
        linear=(frozenset({0, 2} if bias else {0}),),
        once=frozenset({2}) if bias else frozenset(),
        contraction=True,
        localize="groups",
    )


def spatial(node: Node) -> Rule | str:
    """Pooling and resampling: batch and channels pass, everything after them is whole."""
    letters = Letters()
    source, target = shape(operands(node)[0]), shape(node)
    lead = letters.dims(source[:2])
    if source[:2] != target[:2]:
        return "batch or channels change"
    old, new = letters.dims(source[2:]), letters.dims(target[2:])
    return Rule(
        ((*lead, *old),),
        tuple((*lead, *new) for _ in results(node)),
        letters.sizes,
        whole=frozenset(letter for d in old + new for letter in d),
    )


def einsum(node: Node) -> Rule | str:
    """An einsum is its own rule; repeated letters in one operand and ellipses are refused."""
    equation = str(node.args[0]).replace(" ", "")
    if "." in equation or "->" not in equation:
        return "ellipses and implicit results are not supported"
    left, right = equation.split("->")
    terms = left.split(",")
    if any(len(set(t)) != len(t) for t in terms):
        return "a letter stands twice in one operand"
    ops = operands(node)
    sizes: dict[str, Size] = {}
    labels: list[Labels] = []
    for term, tensor in zip(terms, ops, strict=True):
        labels.append(tuple((c,) if s != 1 else () for c, s in zip(term, shape(tensor), strict=True)))
        sizes |= {c: s for c, s in zip(term, shape(tensor), strict=True) if s != 1}
    out = tuple((c,) if c in sizes else () for c in right)
    return Rule(
        tuple(labels),
        (out,),
        sizes,
        reduce={c: "sum" for c in sizes if c not in right},
        linear=tuple(frozenset({i}) for i in range(len(ops))) if len(set(ops)) == len(ops) else (),
        contraction=len(ops) > 1,
    )

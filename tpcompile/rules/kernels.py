"""Rules of attention kernels, and of calls that keep their python.

Such a call is one operator in the graph (``tpcompile.autograd_function``), whose key says what is called.
Attention goes by heads: query heads are ``(groups repeats)``, as in torch's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from tpcompile.ir.nodes import operands, results, shape
from tpcompile.ir.sizes import Size, divide, sizes_of
from tpcompile.ir.torch_internals import OpOverload

from .pointwise import broadcast
from .rule import Dim, Labels, Letters, Rule, letters_of

FLEX_ATTENTION, BLOCK_MASK = "torch.flex_attention", "torch.create_block_mask"
HEADS = 3
"""So many of flex attention's numbers say which heads a rank has; the next one counts its mask's tensors."""
_FLASH = re.compile(r"(^|\.)flash_attn_interface\.FlashAttn(Varlen)?Func$")
"""Flash attention 2 and 3, their own packages' and those of the hub, whose modules have a digest before."""
_OPERANDS = {"q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "alibi_slopes", "s_aux"}


def function_name(node: Node) -> str:
    """What a call of python calls: ``module.Class`` of a function of autograd."""
    return str(node.args[2]).partition("(")[0]


def autograd_function(node: Node) -> Rule | str:
    """A call of python: what is known by its name, or elementwise."""
    name = function_name(node)
    if name in _KNOWN:
        return _KNOWN[name](node)
    if node.args[3]:
        return broadcast(node)
    if _FLASH.search(name):
        return flash_attention(node)
    return f"not all that {name} does, forward and backward, is elementwise"


def flash_attention(node: Node) -> Rule | str:
    """``b q (g r) d, b k g d, b k g v -> b q (g r) v``; without ``b`` where sequences are packed in one row.

    Further operands are slopes and sinks, which have the heads, or integers about sequences, which are whole,
    as are positions and features.
    """
    if isinstance(node.target, OpOverload) and str(node.target).removesuffix(".default") in ROWS:
        declared = [argument.name for argument in node.target._schema.arguments]
        given = {*(n for n, x in zip(declared, node.args, strict=False) if isinstance(x, Node))}
        given |= {n for n, x in node.kwargs.items() if isinstance(x, Node)}
        if given - _OPERANDS:
            return f"it is given {', '.join(sorted(given - _OPERANDS))}"
    (q, k, v), others = (shape(o) for o in operands(node)[:3]), operands(node)[3:]
    letters = Letters()
    heads = query_heads(q[-2], k[-2], letters)
    if len({len(q), len(k), len(v)}) > 1 or len(q) not in (3, 4) or heads is None or v[-2] != k[-2]:
        return "its operands are not those of attention"
    query, group = heads
    lead = letters.dims(q[:-3])
    length, keys, features, values = letters.dims((q[-3], k[-3], q[-1], v[-1]))
    beside = [_beside(o, (lead, query, group), (q[-2], k[-2]), letters) for o in others]
    if any(labels is None for labels in beside):
        return "it is given more than queries, keys, values, slopes and lengths"
    free = letters_of((*lead, query))
    outputs = [_output(r, (*lead, length, query, values), q[-2], letters) for r in results(node)]
    return Rule(
        (
            (*lead, length, query, features),
            (*lead, keys, group, features),
            (*lead, keys, group, values),
            *(labels for labels in beside if labels is not None),
        ),
        tuple(outputs),
        letters.sizes,
        whole=frozenset(letters.sizes) - free,
        fixed=frozenset(i for i, r in enumerate(results(node)) if not r.dtype.is_floating_point),
        nonempty=True,
        contraction=True,
    )


ROWS = dict.fromkeys(
    (
        "flash_attn._flash_attn_forward",
        "flash_attn._flash_attn_varlen_forward",
        "flash_attn_3._flash_attn_forward",
    ),
    flash_attention,
)
"""Operators of flash attention's own packages, with its rule."""


def query_heads(q: Size, k: Size, letters: Letters) -> tuple[Dim, Dim] | None:
    """Labels of the dimension of query heads, and of that of key heads; None if these don't divide those."""
    repeats = divide(q, k)
    if repeats is None:
        return None
    group = letters.dim(k)
    return group + letters.dim(repeats), group


def _beside(
    operand: Node, labels: tuple[Labels, Dim, Dim], heads: tuple[Size, Size], letters: Letters
) -> Labels | None:
    """Labels of an operand beside queries, keys and values; None for one that is not known."""
    sizes, (lead, query, group) = shape(operand), labels
    if not operand.meta["val"].dtype.is_floating_point:
        return letters.dims(sizes) if len(sizes) == 1 else None
    if not sizes or sizes[-1] not in heads or len(sizes) > 1 + len(lead):
        return None
    first = tuple(() if size == 1 else dim for size, dim in zip(sizes[:-1], lead, strict=False))
    return (*first, query if sizes[-1] == heads[0] else group)


def _output(result: torch.Tensor, out: Labels, heads: Size, letters: Letters) -> Labels:
    """Labels of a result: of what is attended to, of logarithms of sums ``b h q``, of anything else."""
    *lead, length, query, _ = out
    sizes = sizes_of(result)
    if len(sizes) == len(out):
        return out
    if result.dtype is torch.float32 and len(sizes) == len(out) - 1 and sizes[-2] == heads:
        return (*lead, query, length)
    return letters.dims(sizes)


def flex_attention(node: Node) -> Rule | str:
    """``b (g r) q d, b g k d, b g k v -> b (g r) q v``: heads may be divided. What python reads is whole.

    It may read anything of a head by its number, and of a batch. A mask for each head goes with the heads.
    """
    numbers: Any = node.args[1]
    (q, k, v), others = (shape(o) for o in operands(node)[:3]), operands(node)[3:]
    letters = Letters()
    heads = query_heads(q[1], k[1], letters)
    if heads is None:
        return "query heads are not a multiple of key heads"
    query, group = heads
    batch, length, keys, features, values = letters.dims((q[0], q[2], k[2], q[3], v[3]))
    one = batch if k[0] == q[0] else ()
    blocks, read = others[: numbers[HEADS]], others[numbers[HEADS] :]

    def of_blocks(sizes: tuple[Size, ...]) -> Labels:
        each = query if sizes[1] == q[1] else letters.dim(sizes[1])
        return (letters.dim(sizes[0]), each, *letters.dims(sizes[2:]))

    inputs = (
        (batch, query, length, features),
        (one, group, keys, features),
        (one, group, keys, values),
        *(of_blocks(shape(o)) for o in blocks),
        *(letters.dims(shape(o)) for o in read),
    )
    return Rule(
        inputs,
        ((batch, query, length, values), (batch, query, length), (batch, query, length)),
        letters.sizes,
        whole=frozenset(letters.sizes) - frozenset(query),
        nonempty=True,
        contraction=True,
        localize="flex_attention",
    )


def block_mask(node: Node) -> str:
    """A mask for flex attention is made whole: it is small, and its python may read anything."""
    return "a mask of blocks is made whole"


_KNOWN: dict[str, Callable[[Node], Rule | str]] = {FLEX_ATTENTION: flex_attention, BLOCK_MASK: block_mask}

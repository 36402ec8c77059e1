"""Rules of linear layers over bitsandbytes' weights (``ir/quantised_linear.py``)."""

from __future__ import annotations

from torch.fx import Node

from tpcompile.ir.nodes import operands, option, shape
from tpcompile.ir.sizes import divide

from .rule import Letters, Rule, letters_of


def linear_4bit(node: Node) -> Rule:
    """``x[... (g h 2)], packed[n (g h)], scales[n g], bias[n] -> [... n]``: what shares a scale is whole."""
    x, packed, scales, *bias = (shape(o) for o in operands(node))
    letters = Letters()
    *lead, rows = letters.dims((*x[:-1], packed[0]))
    blocks = letters.dim(scales[1])
    inside, pair = letters.new(divide(packed[1], scales[1])), letters.new(2)
    once = frozenset({3} if bias else ())
    return Rule(
        ((*lead, (*blocks, inside, pair)), (rows, (*blocks, inside)), (rows, blocks), *[(rows,)] * len(bias)),
        ((*lead, rows),),
        letters.sizes,
        whole=frozenset({inside, pair}),
        reduce=dict.fromkeys(blocks, "sum"),
        linear=(frozenset({0}) | once,),
        once=once,
        nonempty=True,
        contraction=True,
    )


def linear_8bit(node: Node) -> Rule:
    """``x[... k], numbers[n k], scales[n], bias[n] -> [... n]``: a row of x is rounded by its largest number.

    What is too large for that is found by looking at all rows.
    """
    x, numbers, *_ = (shape(o) for o in operands(node))
    letters = Letters()
    *lead, k, rows = letters.dims((*x, numbers[0]))
    apart = letters_of(lead) if option(node, "threshold") else frozenset()
    return Rule(
        ((*lead, k), (rows, k), *[(rows,)] * (len(operands(node)) - 2)),
        ((*lead, rows),),
        letters.sizes,
        whole=frozenset(k) | apart,
        nonempty=True,
        contraction=True,
    )


ROWS = {"tpcompile.linear_4bit": linear_4bit, "tpcompile.linear_8bit": linear_8bit}
"""By operator."""

"""The rule of a custom strategy's module: exactly the placements that the strategy declares."""

from __future__ import annotations

import re

from torch.fx import Node

from tpcompile.errors import TpCompileError
from tpcompile.ir.nodes import arguments, operands, shape
from tpcompile.ir.placements import Partial, Placement, R, Shard
from tpcompile.ir.sizes import sizes_of

from .rule import Declared, Letters, Rule, letters_of

NAME = "tpcompile.opaque_module"
_SHARD = re.compile(r"S\((-?\d+)(?:/(\d+))?\)")


def opaque_module(node: Node) -> Rule:
    """No dimension relates to another: all have letters of their own, none of which may be divided."""
    inputs, _, key, input_lies, output_lies, summed = arguments(node)
    letters = Letters()
    labels = [letters.dims(sizes_of(o.meta["val"])) for o in operands(node)]
    made = letters.dims(shape(node))
    lie: list[Placement] = [R] * len(labels)
    lie[0] = _parse(input_lies, len(labels[0]), key)
    declared = Declared(tuple(lie), (_parse(output_lies, len(made), key),), frozenset(summed), len(inputs))
    every = frozenset().union(*map(letters_of, labels), letters_of(made))
    return Rule(tuple(labels), (made,), letters.sizes, whole=every, declared=declared)


def is_opaque(node: Node) -> bool:
    """Whether a node is a custom strategy's module."""
    return node.op == "call_function" and str(node.target).startswith(NAME)


def _parse(text: str, ndim: int, key: str) -> Placement:
    if (match := _SHARD.fullmatch(text)) is None:
        return R if text == "R" else Partial()
    dim = int(match[1])
    if not -ndim <= dim < ndim:
        raise TpCompileError(
            f"{text} is declared of a tensor of {ndim} dimensions", where=key, todo="correct the layouts"
        )
    return Shard(dim % ndim, int(match[2] or 0))

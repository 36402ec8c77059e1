"""Whether a rule describes a call, and what of it is of use."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch.fx import Node

from tpcompile.errors import TpCompileError
from tpcompile.ir.nodes import operands, results, shape
from tpcompile.ir.sizes import sizes_of

from .rule import Rule


def without_useless(rule: Rule, node: Node) -> Rule:
    """Leaves out partial sums of truth values, and those that want one value both partial and whole."""
    ops = operands(node)

    def useful(group: frozenset[int]) -> bool:
        others = {ops[i] for i in range(len(ops)) if i not in group}
        return not any(ops[i] in others or ops[i].meta["val"].dtype is torch.bool for i in group)

    kept = tuple(group for group in rule.linear if useful(group))
    return rule if kept == rule.linear else replace(rule, linear=kept)


def refuse_misfit(rule: Rule, node: Node) -> None:
    """Refuses a rule that does not describe a node's shapes: that is an error in the rule, not in the model.

    Raises:
        TpCompileError: it does not.
    """
    shapes = [*map(shape, operands(node)), *map(sizes_of, results(node))]
    labels = [*rule.inputs, *rule.outputs]
    if list(map(len, shapes)) != list(map(len, labels)):
        raise TpCompileError(
            f"the rule of {node.target} does not fit its shapes {shapes}",
            where=str(rule),
            todo="correct the rule (tpcompile.register_rule)",
        )
    for sizes, dims in zip(shapes, labels, strict=True):
        for size, dim in zip(sizes, dims, strict=True):
            product = math.prod(rule.sizes[letter] for letter in dim)
            # Sizes that follow from others can be equal and look different: those are not divided anyway.
            if product != size and isinstance(product, int) and isinstance(size, int):
                raise TpCompileError(
                    f"in the rule of {node.target}, {dim} is not a factorisation of {size}",
                    where=str(rule),
                    todo="correct the rule (tpcompile.register_rule)",
                )

"""Which parameters must be divided, and what it costs to leave one whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from tpcompile.ir import markers
from tpcompile.ir.nodes import operands, producer, shape, tensor_of
from tpcompile.rules.factors import Factors
from tpcompile.rules.rule import Rule

# A parameter below this share of the parameters beside it stays whole if dividing it would take a
# collective of its own (a router, MLA's latent projections, the only key head of many query heads).
SMALL = 0.2
# What a whole small parameter is charged, as a share of gathering its matmul's result: below one, so
# that a collective for it alone does not pay; above one half, so that one for two of them does.
SMALL_PRICE = 0.6
# Seconds; larger than any modelled step, so that dividing comes before time.
MUST_DIVIDE = 1e4
# Seconds that a later call is held to lose with a weight that it has to gather; far more than it does.
GATHERED = 0.1
_SCALES = (torch.ops.aten.mul.Tensor, torch.ops.aten.div.Tensor, torch.ops.aten.sub.Tensor)
_JOINS = (torch.ops.aten.cat.default, torch.ops.aten.stack.default)
_CHOICES = (torch.ops.aten.maximum.default, torch.ops.aten.where.self)
GATHERS = markers.COMMUNICATING - {markers.all_reduce, markers.all_reduce_coalesced}
"""What brings parts of a weight to other ranks."""


def module_of(name: str) -> str:
    """The module that holds the leaf module of a parameter (``a.attn`` for ``a.attn.q.weight``)."""
    return ".".join(name.split(".")[:-2])


def shares(sizes: Mapping[Node, float], names: Mapping[Node, str]) -> dict[Node, float]:
    """Each parameter's share of the parameters beside it.

    Beside it are those below the same parent module, repeated blocks (a numbered child) excepted:
    an output head is held against the embedding, not against eighty layers.

    Args:
        sizes: bytes per parameter.
        names: the qualified names.
    """
    beside: dict[str, float] = {}
    for key, size in sizes.items():
        parts = names[key].split(".")
        for depth in range(len(parts)):
            if any(p.isdigit() for p in parts[depth:]):
                continue
            parent = ".".join(parts[:depth])
            beside[parent] = beside.get(parent, 0.0) + size
    return {key: size / beside.get(module_of(names[key]), size) for key, size in sizes.items()}


def weight_root(value: Node, params: set[Node], *, rows: bool = False) -> Node | None:
    """The first of a value's ``weight_roots``, if it has some."""
    return next(iter(weight_roots(value, params, rows=rows)), None)


def weight_roots(value: Node, params: set[Node], *, rows: bool = False) -> dict[Node, None]:
    """The parameters that a value is a rearrangement of (views, casts, slices, joined ones), scaled or not.

    Args:
        value: the value.
        params: the parameters.
        rows: also look through a choice of rows by integers, such as each token's expert.

    Returns:
        None of them if something else is in it.
    """
    found: dict[Node, None] = {}
    waiting, seen = [value], set[Node]()
    while waiting:
        value = waiting.pop()
        if value in params:
            found[value] = None
            continue
        value = producer(value)[0]
        if value in seen:
            continue
        seen.add(value)
        ops = operands(value) if value.op == "call_function" else []
        chosen = rows and value.target is torch.ops.aten.index.Tensor
        if value.target in _JOINS + _CHOICES:  # choices: of numbers that bits stand for
            waiting += ops[::-1]
        elif len(ops) == 1 or chosen or _scales(value, ops):
            waiting.append(ops[0])
        else:
            return {}
    return found


def _scales(value: Node, ops: list[Node]) -> bool:
    """Whether a value is its first operand times something smaller, or less it, such as a length per row."""
    if value.target not in _SCALES or len(ops) != 2:
        return False
    first, second = shape(ops[0]), shape(ops[1])
    return first == shape(value) and second != first


def worth_dividing(factors: Factors, params: set[Node]) -> set[int]:
    """Atoms of static size that a parameter has where a contraction uses it: the candidates.

    Other dimensions (batch, sequence, a position table's rows that are merely added) may not be
    divided: that would be data parallelism, with whole weights.
    """
    found: set[int] = set()
    for node, rule in factors.rules.items():
        if not (isinstance(rule, Rule) and rule.contraction):
            continue
        for operand in operands(node):
            for root in weight_roots(operand, params, rows=True):
                own = set(factors.places(root).values())
                found.update(own.intersection(factors.places(operand).values()))
    for node, carriers in factors.carriers.items():
        for carrier in carriers:
            if carrier.stack is not None and weight_root(operands(node)[carrier.stack], params) is not None:
                atoms = factors.atoms(operands(node)[carrier.stack], 0)
                found.update(atoms if len(atoms) == 1 else ())
    return {a for a in found if isinstance(factors.size(a), int)}


def matrix(value: Node) -> bool:
    """A parameter with at least two real dimensions; norms and biases may always stay whole."""
    return sum(s != 1 for s in tensor_of(value).shape) >= 2


def held_elsewhere(factors: Factors) -> set[Node]:
    """Parameters that are placed as a custom strategy wants it, whatever the plan says of them."""
    found: set[Node] = set()
    for node, rule in factors.rules.items():
        if isinstance(rule, Rule) and rule.declared is not None:
            found.update(operands(node)[rule.declared.weights :])
    return found

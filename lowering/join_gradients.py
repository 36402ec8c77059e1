"""Gradients of small weights that the ranks must add up travel together, in one message per step.

Norms on divided positions or heads have whole weights, of whose gradients each rank has a summand: an
all-reduce of a few kilobytes for each of them, in which latency is all that counts.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from tpcompile.ir.graph_edit import behind, call
from tpcompile.ir.regions import mark
from tpcompile.ir.sizes import bytes_of

from . import collective_moves as moves
from .collectives import _register, _same
from .first_derivatives import once
from .state import SOURCE

ops = torch.ops.tpcompile
LARGEST = 1 << 20
"""Bytes of a weight above which putting its gradient beside others costs more than a message."""


def join_gradients(graph: Graph) -> None:
    """Copies small weights of a rank's graph to the ranks together, before anything else is computed.

    Their gradients are sent as soon as the last of them is there, which is at the end of backward. A gradient
    that nobody asks for is still none, and so is a frozen weight's.
    """
    alike: dict[tuple[Any, torch.dtype], list[Node]] = {}
    for node in graph.find_nodes(op="call_function", target=ops.copy_to_ranks.default):
        weight, group = node.args
        if weight.op == "placeholder" and weight.meta[SOURCE].spec.kind == "param":
            if bytes_of(weight.meta["val"]) <= LARGEST:
                alike.setdefault((group, weight.meta["val"].dtype), []).append(node)
    for (group, _), copies in alike.items():
        if len(copies) > 1:
            _join(graph, copies, group)


def _join(graph: Graph, copies: list[Node], group: str) -> None:
    weights = [copy.args[0] for copy in copies]
    with graph.inserting_before(behind(next(iter(graph.nodes)))):
        joined = call(graph, ops.copy_all_to_ranks.default, (weights, group), like=copies[0])
        mark(joined, None)
        for at, copy in enumerate(copies):
            result = graph.call_function(operator.getitem, (joined, at))
            result.meta.update(copy.meta)
            mark(result, None)
            copy.replace_all_uses_with(result)
    for copy in copies:  # not before: new calls may stand before one of them
        graph.erase_node(copy)


@_register("(Tensor(a)[] xs, str group) -> Tensor(a)[]")
def copy_all_to_ranks(xs: Sequence[Tensor], group: str) -> list[Tensor]:
    """`copy_to_ranks` of several tensors of one type, whose gradients travel together.

    Forward gives views. In backward those that have a gradient take part: all ranks have the same ones.
    """
    trained = [x for x in xs if x.requires_grad]
    if not (trained and torch.is_grad_enabled()):
        return list(map(_same, xs))
    copies = iter(_Copies.apply(group, *trained))
    return [next(copies) if x.requires_grad else _same(x) for x in xs]


class _Copies(torch.autograd.Function):
    """Views of several tensors; what the ranks have of their gradients is summed up in one all-reduce."""

    @staticmethod
    def forward(group: str, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(_same, xs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.group = inputs[0]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [grad for grad in grads if grad is not None]
        if not there:
            return (None,) * (1 + len(grads))
        whole = _summed(ctx, torch.cat([grad.flatten() for grad in there]))
        pieces = iter(whole.split([grad.numel() for grad in there]))
        return None, *(None if grad is None else next(pieces).view(grad.shape) for grad in grads)


def sends_joined(backward: Any) -> bool:
    """Whether what a node of autograd's graph sends are gradients that travel together."""
    return backward is not None and backward.name() == f"{_Copies.__name__}Backward"


@once
def _summed(ctx: Any, grad: Tensor) -> Tensor:
    return moves.reduce(grad, ctx.group, "sum")

"""Messages of gradients travel beside matmuls: those of values that linear layers of all ranks read.

In backward of a column-parallel layer the gradient of its input is a sum over the ranks, for which nothing
else is needed than the weights; the weights' own gradients need no other rank. So the message is begun first,
and waited for when they are computed. Layers that read the same value (queries, keys and values) share it, as
they do without this.

Source: Megatron-LM's linear layer with asynchronous communication (Narayanan et al. 2021; with a divided
sequence, whose input can be gathered again in backward instead of being kept: Korthikanti et al. 2022).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn import functional as F

from tpcompile.ir.regions import region_of

from . import position_moves as moves
from .collectives import _LIBRARY, _register, _same
from .first_derivatives import begin_once, refuse_several
from .send import Begun, begin_reduce

ops = torch.ops.tpcompile


def overlap_gradients(graph: Graph, again: bool = False) -> bool:
    """Has a rank's graph compute linear layers of a value together with what brings it to all ranks.

    Args:
        graph: is changed.
        again: values that are gathered for such layers are gathered again in backward, instead of being kept.

    Returns:
        Whether there are any.
    """
    place = {node: at for at, node in enumerate(graph.nodes)}
    found = False
    for node in list(graph.nodes):
        partial = node.target is ops.gather_positions.default and node.args[6]
        if partial or node.target is ops.copy_to_ranks.default:
            linears = [user for user in node.users if _may_join(user, node, place)]
            if linears:
                _join(graph, node, linears, again and region_of(node) is None)
                found = True
    return found


def _may_join(linear: Node, read: Node, place: dict[Node, int]) -> bool:
    """Whether a call is a linear layer of a value that can be computed where the value is."""
    if linear.target is not torch.ops.aten.linear.default or region_of(linear) != region_of(read):
        return False
    x, *layer = linear.args
    given = [n for n in layer if isinstance(n, Node)]
    if x is not read or read in given or linear.kwargs or any(place[n] > place[read] for n in given):
        return False
    value, weight = read.meta["val"], given[0].meta["val"]
    return value.dtype.is_floating_point and value.ndim > 1 and weight.ndim == 2


def _join(graph: Graph, read: Node, linears: Sequence[Node], again: bool) -> None:
    weights = [linear.args[1] for linear in linears]
    biases = [(*linear.args, None)[2] for linear in linears]
    with graph.inserting_before(read):
        if read.target is ops.copy_to_ranks.default:
            x, *rest = read.args
            joined = graph.call_function(ops.copy_linears.default, (x, weights, biases, *rest))
        else:
            x, group, dim, ranks, _, size, _ = read.args
            rest = [group, dim, ranks, size, again]
            joined = graph.call_function(ops.gather_linears.default, (x, weights, biases, *rest))
        stacks = [n.meta.get("nn_module_stack") or {} for n in linears]
        shared = dict(item for item in stacks[0].items() if all(item in s.items() for s in stacks))
        joined.meta = {
            **read.meta,
            "val": [n.meta["val"] for n in (read, *linears)],
            "nn_module_stack": shared,
        }
        for at, node in enumerate((read, *linears)):
            result = graph.call_function(operator.getitem, (joined, at))
            result.meta.update(node.meta)
            node.replace_all_uses_with(result)
    for node in (*linears, read):
        graph.erase_node(node)
    if not (whole := joined.next).users:
        graph.erase_node(whole)


@dataclass(frozen=True)
class _Way:
    """How a value comes to all ranks, and its gradient back.

    Attributes:
        give: forward.
        begin: begins to send the gradient.
        again: begins to give once more in backward, so that the value need not be kept; None: it is kept.
    """

    give: Callable[[Tensor], Tensor]
    begin: Callable[[Tensor], Begun]
    again: Callable[[Tensor], Begun] | None = None


@_register("(Tensor x, Tensor[] weights, Tensor?[] biases, str group) -> Tensor[]")
def copy_linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], group: str
) -> list[Tensor]:
    """`copy_to_ranks` and `linear` of its result by each weight: the copy, and each layer's result.

    Args:
        x: [..., in], whole.
        weights: [out of this rank, in].
        biases: [out of this rank], or None.
        group: the group's name.
    """
    way = _Way(_same, lambda grad: begin_reduce(grad.contiguous(), "sum", group))
    return _linears(x, weights, biases, way)


@_register(
    "(Tensor x, Tensor[] weights, Tensor?[] biases, str group, int dim, int ranks, SymInt size, bool again, "
    "bool chunked=False) -> Tensor[]"
)
def gather_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    group: str,
    dim: int,
    ranks: int,
    size: int,
    again: bool,
    chunked: bool = False,
) -> list[Tensor]:
    """`gather_positions` and `linear` of its result by each weight: what was gathered, and all results.

    Args:
        x: [..., in], this rank's positions.
        weights: [out of this rank, in].
        biases: [out of this rank], or None.
        group: the group's name.
        dim: the dimension of positions.
        ranks: how many ranks share them.
        size: how many positions there are.
        again: gathers them again in backward, where they would be kept otherwise.
        chunked: in the form that Inductor knows (``chunk_collectives``).
    """
    way = _Way(
        lambda a: moves.gather(a, group, dim, ranks, size, chunked=chunked),
        lambda grad: moves.begin_scatter(grad, group, dim, ranks, zeros=True, chunked=chunked),
        (lambda a: moves.begin_gather(a, group, dim, ranks, size, chunked=chunked)) if again else None,
    )
    return _linears(x, weights, biases, way)


def _linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], way: _Way
) -> list[Tensor]:
    trained = any(t is not None and t.requires_grad for t in (x, *weights, *biases))
    if torch.is_grad_enabled() and trained:
        return list(_Linears.apply(way, x, *weights, *biases))
    return list(_Linears.forward(way, x, *weights, *biases))


class _Linears(torch.autograd.Function):
    """Several linear layers of one value that comes to all ranks."""

    @staticmethod
    def forward(way: _Way, x: Tensor, *layers: Tensor | None) -> tuple[Tensor, ...]:
        y, weights = way.give(x), _weights(layers)
        return y, *map(F.linear, [y] * len(weights), weights, layers[len(weights) :])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.way, x, *layers = inputs
        ctx.set_materialize_grads(False)
        _, of_x, *of_layers = ctx.needs_input_grad
        kept = output[0] if ctx.way.again is None else x
        ctx.save_for_backward(kept if any(_weights(of_layers)) else None, *(_weights(layers) if of_x else ()))

    @staticmethod
    def backward(ctx: Any, y_grad: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kept, *weights = ctx.saved_tensors
        _, of_x, *of_layers = ctx.needs_input_grad
        first = next((grad for grad in (y_grad, *grads) if grad is not None), None)
        if first is None:
            return (None,) * len(ctx.needs_input_grad)
        refuse_several(first)
        again = None
        if kept is not None and ctx.way.again is not None:
            again = begin_once(ops.as_late_as(kept, first), ctx.way.again)
        sent = begin_once(_input_grad(y_grad, grads, weights), ctx.way.begin) if of_x else None
        rows = [None if grad is None else grad.flatten(0, -2) for grad in grads]
        y = kept if again is None else again()
        read = None if y is None else y.flatten(0, -2)
        found: list[Tensor | None] = []
        for at, asked in enumerate(of_layers):
            grad = rows[at % len(rows)] if asked else None
            if at < len(rows):
                found.append(None if grad is None or read is None else grad.t() @ read)
            else:
                found.append(None if grad is None else grad.sum(0))
        return None, sent() if sent is not None else None, *found


def _weights(layers: Sequence[Any]) -> Sequence[Any]:
    """The first half of what is said of weights, and then of biases."""
    return layers[: len(layers) // 2]


def _input_grad(y_grad: Tensor | None, grads: Sequence[Tensor | None], weights: Sequence[Tensor]) -> Tensor:
    """The gradient of what all layers read, as far as this rank knows of it."""
    total = None if y_grad is None else y_grad.flatten(0, -2)
    there = [(grad, weight) for grad, weight in zip(grads, weights, strict=True) if grad is not None]
    for grad, weight in there:
        rows = grad.flatten(0, -2)
        total = rows @ weight if total is None else torch.addmm(total, rows, weight)
    shape = y_grad.shape if y_grad is not None else (*there[0][0].shape[:-1], there[0][1].shape[1])
    assert total is not None, "there is a gradient"
    return total.view(shape)


def _as_late_as(x: Tensor, other: Tensor) -> Tensor:
    """A copy of `x` that is there no earlier than `other`.

    Compiled code would otherwise take what is gathered in forward and again in backward for one value, and
    keep it.
    """
    return x.clone()


_LIBRARY.define("as_late_as(Tensor x, Tensor other) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("as_late_as", _as_late_as, "CompositeExplicitAutograd")

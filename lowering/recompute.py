"""Regions of a rank's graph under ``torch.utils.checkpoint``: recomputed in backward, collectives included.

All ranks recompute the same collectives in the same order: autograd comes to the regions in the order of
their graphs, which is the same on all ranks, and a region is recomputed from its beginning up to the last
value that its backward needs, which follows from its operators. Custom strategies and autograd functions are
code of the user's, which may keep other values on each rank: with these, a region is recomputed to its end.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import checkpoint

from tpcompile.capture.export.checkpoint_calls import ContextFn
from tpcompile.capture.export.kept_calls import FUNCTION
from tpcompile.ir.graph_edit import copied
from tpcompile.ir.regions import members_of

from . import local_module as _registers_the_operator  # noqa: F401
from .overlap_gradients import overlap_gradients
from .take_out import take_out

_FOREIGN = (FUNCTION, torch.ops.tpcompile.local_module.default)
"""Operators that run code of the user's, which may also draw random numbers of its own."""


def for_training(
    whole: Graph, contexts: Mapping[str, ContextFn | None], again: bool = False
) -> GraphModule | None:
    """A copy of a program for calls that record gradients; None if it would be no other.

    Args:
        whole: a rank's graph, in which the calls of every region stand together.
        contexts: what is saved of the regions, by the names that their nodes are marked with.
        again: what is gathered for linear layers is gathered again in backward, where it is not in a region.
    """
    graph, _ = copied(whole)
    overlaps, regions = overlap_gradients(graph, again), members_of(graph)
    for number, (region, calls) in enumerate(regions.items()):
        _replace(graph, calls, contexts[region.name], number).meta["block"] = region.block
    graph.lint()
    return GraphModule(nn.Module(), graph, "TrainingProgram") if regions or overlaps else None


def _replace(graph: Graph, calls: Sequence[Node], context: ContextFn | None, number: int) -> Node:
    """Puts one call that is checkpointed where a region's calls are; returns it."""
    inside = set(calls)
    operands = list(dict.fromkeys(n for call in calls for n in call.all_input_nodes if n not in inside))
    results = [call for call in calls if any(user not in inside for user in call.users)]
    body = take_out(calls, operands, results, "Region")
    with graph.inserting_after(calls[-1]):
        region = graph.call_function(_checkpointed(body, context, number), tuple(operands))
    with graph.inserting_after(region):
        for at, node in reversed(list(enumerate(results))):
            result = graph.call_function(operator.getitem, (region, at))
            result.meta.update(node.meta)
            node.replace_all_uses_with(result, lambda user: user not in inside)
    for node in reversed(calls):
        graph.erase_node(node)
    return region


def _checkpointed(body: GraphModule, context: ContextFn | None, number: int) -> Callable[..., Any]:
    """A function that computes a region, now and again in backward."""
    # Our own random numbers follow from a seed that the region is given: no generator's state is kept.
    foreign = any(node.target in _FOREIGN for node in body.graph.nodes)
    options: dict[str, Any] = {"preserve_rng_state": foreign}
    if foreign:
        options["early_stop"] = False
    if context is not None:
        options["context_fn"] = context
        body.meta["_checkpoint_context_fn"] = context  # where torch's compiler looks for it
    compute = body.forward

    def region(*operands: Any) -> Any:
        return checkpoint(compute, *operands, use_reentrant=False, **options)

    region.__name__ = region.__qualname__ = f"region_{number}"
    region.body = body  # type: ignore[attr-defined]
    return region


def body_of(call: Node) -> GraphModule | None:
    """What a call computes that is computed again in backward; None for other calls."""
    return getattr(call.target, "body", None) if isinstance(call.target, FunctionType) else None

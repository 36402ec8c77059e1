"""A program in which what travels or is multiplied together is apart, as the proof looks at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from tpcompile.errors import TpCompileError
from tpcompile.ir import markers
from tpcompile.ir.nodes import module_path
from tpcompile.planner.global_program import GlobalProgram


def unmerged(program: GlobalProgram) -> tuple[Graph, dict[Node, Node]]:
    """A copy of the graph in which what travels or is multiplied together is apart, and the nodes' copies."""
    graph, copies = Graph(), dict[Node, Node]()
    for node in program.graph.nodes:
        owner = node.args[0] if node.args else None
        if node.target in (markers.matmul_merged, markers.all_reduce_coalesced):
            _refuse_unordered(program, node)
            continue
        if node.target is markers.part_of or getattr(owner, "target", None) is markers.all_reduce_coalesced:
            target, args = _part(node)
            copy = graph.call_function(target, torch.fx.node.map_arg(args, copies.__getitem__))
            copy.meta.update(node.meta)
        else:
            copy = graph.node_copy(node, copies.__getitem__)
        copies[node] = copy
    return graph, copies


def _part(node: Node) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The call that gives one of several results alone."""
    joint, index = node.args
    assert isinstance(joint, Node) and isinstance(index, int)
    if joint.target is markers.matmul_merged:
        target, *args = joint.args
        return target, tuple(a[index] if isinstance(a, list | tuple) else a for a in args)  # type: ignore[return-value]
    values, *options = joint.args
    return markers.all_reduce, (values[index], *options)  # type: ignore[index]


def _refuse_unordered(program: GlobalProgram, node: Node) -> None:
    """Segments that are multiplied as one must be in one parameter, in this order."""
    merged = node.target is markers.matmul_merged
    for joined in (a for a in node.args if merged and isinstance(a, list | tuple)):
        held = [
            source for a in joined if isinstance(a, Node) and (source := program.sources.get(a)) is not None
        ]
        orders = [source.order for source in held]
        together = len({source.spec.name for source in held}) == 1 and len(held) == len(joined)
        if not together or orders != list(range(orders[0], orders[0] + len(orders))):
            raise TpCompileError(
                f"the placements of this program cannot be proved: {node.name} joins {joined}, which are not "
                "stored one behind the other in one parameter",
                where=module_path(node) or node.name,
                todo="correct the pass that made it so",
            )

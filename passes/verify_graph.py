"""Checks that a graph is well formed: run before the first pass and after each."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node

from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import FakeTensor
from tpcompile.planner.global_program import GlobalProgram


def verify_graph(program: GlobalProgram, after: str) -> None:
    """Checks topology, values and placeholders.

    Raises:
        TpCompileError: the graph is invalid; ``after`` names the passes that ran.
    """
    graph = program.graph
    try:
        graph.lint()
    except RuntimeError as error:
        raise TpCompileError(f"invalid graph: {error}", where=f"after {after}", todo="report this") from error
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise TpCompileError(f"{node.op} node {node.name}", where=f"after {after}", todo="report this")
        if node.op != "output" and "val" not in node.meta:
            raise TpCompileError(f"node {node.name} has no value", where=f"after {after}", todo="report this")
        if node.op == "placeholder" and node not in program.sources:
            raise TpCompileError(
                f"input {node.name} has no source", where=f"after {after}", todo="report this"
            )
        if node.target is operator.getitem and not isinstance(node.args[0], Node):
            raise TpCompileError(
                f"{node.name} takes a part of what no call has computed",
                where=f"after {after}",
                todo="use the value itself",
            )
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor) and not isinstance(val, FakeTensor):
            raise TpCompileError(f"{node.name} holds real data", where=f"after {after}", todo="report this")

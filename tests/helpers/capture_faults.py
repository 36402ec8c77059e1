"""Faults in what capture gives: another program than the model's python."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.helpers.faults import Fault
from tpcompile.planner.global_program import GlobalProgram


def _left_out(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
    """A call that leaves shape and type as they are is not there."""
    for node in program.graph.nodes:
        first = next(iter(node.all_input_nodes), None) if node.op == "call_function" else None
        if first is not None and isinstance(val := node.meta.get("val"), torch.Tensor) and node.users:
            other = first.meta.get("val")
            if isinstance(other, torch.Tensor) and other.shape == val.shape and other.dtype == val.dtype:
                yield lambda node=node, first=first: node.replace_all_uses_with(first)


def _stopped(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
    """No gradient flows through a call: as if its backward were lost."""
    for node in program.graph.nodes:
        val = node.meta.get("val")
        if node.op == "call_function" and isinstance(val, torch.Tensor) and val.is_floating_point():
            yield lambda node=node: _detach(node)


def _detach(node: torch.fx.Node) -> None:
    with node.graph.inserting_after(node):
        cut = node.graph.call_function(torch.ops.aten.detach.default, (node,))
    cut.meta.update(node.meta)
    node.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut)


CAPTURES: dict[str, Fault] = {"capture: a call left out": _left_out, "capture: a gradient stops": _stopped}

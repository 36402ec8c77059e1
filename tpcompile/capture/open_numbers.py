"""Numbers in calls that change from call to call: one program for all, where that does the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from tpcompile.errors import TpCompileError
from tpcompile.ir.calls import OpenNumber, flatten_call
from tpcompile.ir.print_graph import target_text
from tpcompile.ir.torch_internals import tree_map_only

from .export.captured import Captured

log = logging.getLogger(__name__)

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def capture_numbers(capture: Callable[[dict[str, Any]], Captured], bound: dict[str, Any]) -> Captured:
    """The program of a call, with its ``OpenNumber``s as symbols if that changes nothing.

    A symbol is no ``int``: python code that asks (``isinstance(keep, int)``) may take another way. So the
    call is captured as it is, too, and what was captured with symbols has to do the same, call by call.

    Args:
        capture: captures a call.
        bound: the call.
    """
    if not any(isinstance(leaf, OpenNumber) for leaf in flatten_call(bound)[0]):
        return capture(bound)
    fixed = capture(tree_map_only(OpenNumber, int, bound))
    try:
        opened = capture(bound)
    except TpCompileError as error:
        log.info("a number among the arguments has to stay fixed: %s", error)
        return fixed
    return opened if _Calls.of(opened) == _Calls.of(fixed) else fixed


@dataclass
class _Calls:
    """The calls of a program with the sizes of its example: symbols are what they are there.

    Attributes:
        rows: per call the operator, its arguments and the form of its result.
        places: the row of every value.
        constants: the constants.
    """

    rows: list[Any] = field(default_factory=list)
    places: dict[Node, Any] = field(default_factory=dict, compare=False)
    constants: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, captured: Captured) -> _Calls:
        """Those of a program."""
        calls = cls(constants=captured.constant_lines())
        graph = captured.graph_module.graph
        names = (f"{spec.kind} {spec.name}" for spec in captured.inputs)
        calls.places.update(zip(graph.find_nodes(op="placeholder"), names, strict=True))
        for node in graph.nodes:
            if node.op not in ("placeholder", "output") and _number(node.meta.get("val")) is None:
                calls.places[node] = len(calls.rows)
                arguments = calls._plain((node.args, node.kwargs))
                calls.rows.append((target_text(node), arguments, calls._plain(node.meta.get("val"))))
        calls.rows.append(calls._plain(graph.output_node().args))
        return calls

    def _plain(self, value: Any) -> Any:
        """Arguments or results as plain data."""
        if isinstance(value, Node):
            number = _number(value.meta.get("val")) if value not in self.places else None
            return self.places[value] if number is None else number
        if isinstance(value, torch.Tensor):
            return ("tensor", self._plain(tuple(value.shape)), str(value.dtype), str(value.device))
        if isinstance(value, (list, tuple)):
            return [self._plain(item) for item in value]
        if isinstance(value, dict):
            return {key: self._plain(item) for key, item in value.items()}
        number = _number(value)
        return (type(value).__name__, repr(value)) if number is None else number


def _number(value: Any) -> Any:
    """The example's value of a symbol, or a number; None for anything else, or where the data decides it."""
    if isinstance(value, _SYMBOLS):
        return value.node.hint if value.node.has_hint() else None
    return value if isinstance(value, (int, float)) else None

"""A program under torch's profiler: its calls are within ranges that are named by the model's modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule, Interpreter, Node
from torch.profiler import record_function


def run_named(program: GraphModule, inputs: Sequence[Any]) -> Any:
    """Runs a graph, call by call: ``model.layers.0.self_attn`` is a range around the calls of that module."""
    run = _NamedRun(program)
    try:
        return run.run(*inputs)
    finally:
        run.enter([])


class _NamedRun(Interpreter):
    """Runs a graph within ranges.

    Attributes:
        ranges: those that are open, from the outermost on, by their names.
    """

    def __init__(self, program: GraphModule) -> None:
        super().__init__(program)
        self.ranges: list[tuple[str, record_function]] = []

    def run_node(self, n: Node) -> Any:
        """Runs a node in the ranges of its module; one that is of no module, in those that are open."""
        if stack := n.meta.get("nn_module_stack"):
            self.enter([str(path) for path, *_ in stack.values() if path])
        return super().run_node(n)

    def enter(self, paths: list[str]) -> None:
        """Leaves the ranges that are not of these modules, and opens those that are missing."""
        same = 0
        while same < min(len(paths), len(self.ranges)) and self.ranges[same][0] == paths[same]:
            same += 1
        while len(self.ranges) > same:
            self.ranges.pop()[1].__exit__(None, None, None)
        for path in paths[same:]:
            opened = record_function(path)
            opened.__enter__()
            self.ranges.append((path, opened))

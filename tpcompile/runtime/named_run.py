"""A program whose calls are seen as those of modules: by torch's profiler, and by its FLOP counter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.nn.modules import module as nn_module
from torch.profiler import record_function
from torch.utils.module_tracker import ModuleTracker

from tpcompile.ir.torch_internals import profiler_enabled, tree_leaves

_TOLD = "tpcompile names its module"


def somebody_watches() -> bool:
    """Whether a profiler, or a counter that tells modules apart, sees what is run."""
    return profiler_enabled() or bool(_trackers())


def run_named(program: GraphModule, inputs: Sequence[Any]) -> Any:
    """Runs a graph, call by call: ``model.layers.0.self_attn`` is a range around the calls of that module.

    A tracker of modules, as ``FlopCounterMode`` has one, is told the same names behind that of the module
    that is called, and in backward those of the call whose gradient is computed.
    """
    run = _NamedRun(program, _trackers())
    try:
        return run.run(*inputs)
    finally:
        run.enter([])


def _trackers() -> list[ModuleTracker]:
    """Those that are told of every call of a module."""
    owners = (getattr(hook, "__self__", None) for hook in nn_module._global_forward_pre_hooks.values())
    return [owner for owner in owners if isinstance(owner, ModuleTracker)]


class _NamedRun(Interpreter):
    """Runs a graph within ranges.

    Args:
        program: the graph.
        trackers: are told where it is.

    Attributes:
        ranges: those that are open, from the outermost on, by their names.
    """

    def __init__(self, program: GraphModule, trackers: Sequence[ModuleTracker]) -> None:
        super().__init__(program)
        self.ranges: list[tuple[str, record_function]] = []
        self._around = [(tracker, frozenset(tracker.parents)) for tracker in trackers]

    def run_node(self, n: Node) -> Any:
        """Runs a node in the ranges of its module; one that is of no module, in those that are open."""
        if stack := n.meta.get("nn_module_stack"):
            self.enter([str(path) for path, *_ in stack.values() if path])
        result = super().run_node(n)
        for tracker, _ in self._around:
            tell = partial(_tell, tracker, frozenset(tracker.parents))
            for value in tree_leaves(result):
                step: Any = value.grad_fn if isinstance(value, Tensor) else None
                # A call that hands on a value is not the one whose gradient is computed there.
                if step is not None and _TOLD not in step.metadata:
                    step.metadata[_TOLD] = True
                    step.register_prehook(tell)
        return result

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
        for tracker, around in self._around:
            # The longest name is that of the module that is called: the others are those it is in.
            called = max(around, key=len)
            tracker.parents = {*around, *(f"{called}.{path}" for path, _ in self.ranges)}


def _tell(tracker: ModuleTracker, parents: frozenset[str], grads: object) -> None:
    """Before a call's gradient is computed."""
    tracker.parents = set(parents)

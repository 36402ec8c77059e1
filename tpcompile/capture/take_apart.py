"""Takes single calls of composite operators apart, in a graph that is otherwise as it should be.

A call is run on its fake tensors, and what torch makes of it is written down: ``to`` becomes ``_to_copy`` or
nothing, ``reshape`` a ``view``. Sizes that come up on the way are calls of the graph, too.
"""

from __future__ import annotations

import operator
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node, Proxy
from torch.fx.experimental.proxy_tensor import extract_val
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from tpcompile.graph_edit import KEPT_META


class CannotTakeApart(Exception):
    """A call does more than make views and new tensors of its inputs."""


class Sizes:
    """What computes the sizes in a graph, as far as it has been looked at.

    Attributes:
        calls: by size, the call that computes it.
        inputs: by size, an input and the dimension of it that has this size.
    """

    def __init__(self) -> None:
        self.calls: dict[sympy.Expr, Node] = {}
        self.inputs: dict[sympy.Expr, tuple[Node, int]] = {}

    def note(self, node: Node) -> None:
        """Remembers a call that computes a size, or an input."""
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt):
            self.calls.setdefault(val.node.expr, node)
        elif node.op == "placeholder" and isinstance(val, Tensor):
            for dim, size in enumerate(val.shape):
                if isinstance(size, torch.SymInt):
                    self.inputs.setdefault(size.node.expr, (node, dim))


def take_apart(node: Node, sizes: Sizes, mode: FakeTensorMode) -> None:
    """Replaces a call by those of which torch composes it.

    Args:
        node: a call of an operator.
        sizes: what computes sizes before it; grows.
        mode: the mode of the graph's fake tensors.

    Raises:
        CannotTakeApart: it writes into a tensor, or uses one that it was not given; nothing is replaced.
    """
    graph, before = node.graph, node.prev
    with graph.inserting_before(node):
        recorder = _Recorder(graph, node, sizes)
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        try:
            with torch.no_grad(), enable_python_dispatcher(), mode, recorder:
                results = node.target(*args, **kwargs)  # type: ignore[operator]
            replacements = recorder.replacements(results)
        except CannotTakeApart:
            while node.prev is not before:
                graph.erase_node(node.prev)
            raise
    for old, new in replacements:
        old.replace_all_uses_with(new)
        graph.erase_node(old)
    if not isinstance(results, Tensor):
        graph.erase_node(node)


class _Recorder(TorchDispatchMode):
    """Writes the calls that reach the kernels into a graph, in the place of one call."""

    def __init__(self, graph: Graph, node: Node, sizes: Sizes) -> None:
        super().__init__()
        self.graph, self.node, self.sizes = graph, node, sizes
        self.place = {k: node.meta[k] for k in KEPT_META if k in node.meta}
        self.found = {id(n.meta["val"]): n for n in node.all_input_nodes}
        self.alive: list[Any] = []  # else another tensor may get the id of one that was written down

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor | list | tuple):
            if not isinstance(func, OpOverload) or func._schema.is_mutable:
                raise CannotTakeApart(f"it calls {func}")
            call = self._add(func, self._as_nodes(args), self._as_nodes(kwargs or {}), result)
            if not isinstance(result, Tensor):
                for i, part in enumerate(result):
                    self._add(operator.getitem, (call, i), {}, part)
        return result

    def replacements(self, results: Any) -> list[tuple[Node, Node]]:
        """What stands for the call's result, or for the parts of it that are used."""
        if isinstance(results, Tensor):
            return [(self.node, self._node(results))]
        parts = [user for user in self.node.users if user.target is operator.getitem]
        if len(parts) < len(self.node.users):
            raise CannotTakeApart("its results are used together")
        return [(part, self._node(results[part.args[1]])) for part in parts]

    def _add(self, target: Any, args: Any, kwargs: Any, val: Any) -> Node:
        call = self.graph.call_function(target, args, kwargs)
        call.meta.update(self.place, val=extract_val(val))  # which is no view of another value
        self.found[id(val)] = call
        self.alive.append(val)
        return call

    def _as_nodes(self, args: Any) -> Any:
        args = tree_map_only(Tensor, self._node, args)
        return tree_map_only(torch.SymInt, lambda size: self._size(size.node.expr), args)

    def _node(self, tensor: Tensor) -> Node:
        if id(tensor) not in self.found:
            raise CannotTakeApart("it uses a tensor that it was not given")
        return self.found[id(tensor)]

    def _size(self, expr: sympy.Expr) -> Node | int:
        if expr.is_number:
            return int(expr)
        calls = self.sizes.calls
        if expr not in calls and expr in self.sizes.inputs:
            val = self.sizes.inputs[expr][0].meta["val"].shape[self.sizes.inputs[expr][1]]
            calls[expr] = self._add(torch.ops.aten.sym_size.int, self.sizes.inputs[expr], {}, val)
        elif expr not in calls and not expr.is_Symbol:
            self._compute(expr)
        if expr not in calls:
            raise CannotTakeApart(f"no size is {expr}")
        return calls[expr]

    def _compute(self, expr: sympy.Expr) -> None:
        """Adds the calls that compute a size from others."""
        symbols = {symbol: Proxy(self._size(symbol)) for symbol in sorted(expr.free_symbols, key=str)}  # type: ignore[arg-type]
        last = self.node.prev
        sympy_interp(PythonReferenceAnalysis, symbols, expr)
        while (new := last.next) is not self.node:
            args = map_arg(new.args, lambda n: n.meta["val"])
            new.meta.update(self.place, val=new.target(*args))  # type: ignore[operator]
            self.sizes.note(new)
            last = new

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
from torch.fx import Graph, Node, Proxy
from torch.fx.experimental.proxy_tensor import extract_val
from torch.fx.node import map_arg

from tpcompile.ir.graph_edit import KEPT_META, behind
from tpcompile.ir.torch_internals import (
    FakeTensorMode,
    OpOverload,
    PythonReferenceAnalysis,
    TorchDispatchMode,
    enable_python_dispatcher,
    sympy_interp,
    tree_map_only,
)


class CannotTakeApart(Exception):
    """A call does more than make views and new tensors of its inputs."""


class Sizes:
    """What says how large the open sizes of a graph are, as far as it has been looked at."""

    def __init__(self) -> None:
        self._calls: dict[sympy.Expr, Node] = {}
        self._inputs: dict[sympy.Expr, tuple[Node, int]] = {}
        self._last: Node | None = None

    def note(self, node: Node) -> None:
        """Remembers a call that gives an open size, or an input."""
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt) and val.node.expr.is_Symbol:
            self._calls.setdefault(val.node.expr, node)
        elif node.op == "placeholder" and isinstance(val, Tensor):
            for dim, size in enumerate(val.shape):
                if isinstance(size, torch.SymInt):
                    self._inputs.setdefault(size.node.expr, (node, dim))

    def of(self, symbol: sympy.Expr) -> Node:
        """The call that gives an open size; if there is none, it is added behind the inputs.

        Raises:
            CannotTakeApart: no input has such a size.
        """
        if symbol not in self._calls:
            if symbol not in self._inputs:
                raise CannotTakeApart(f"no input has the size {symbol}")
            given, dim = self._inputs[symbol]
            with given.graph.inserting_before(behind(self._last or given)):
                call = given.graph.call_function(torch.ops.aten.sym_size.int, (given, dim))
            call.meta["val"] = given.meta["val"].shape[dim]
            self._calls[symbol] = self._last = call
        return self._calls[symbol]


def take_apart(node: Node, sizes: Sizes, mode: FakeTensorMode) -> None:
    """Replaces a call by those of which torch composes it.

    Args:
        node: a call of an operator.
        sizes: what says how large open sizes are; grows.
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
    """Writes the calls that reach the kernels into a graph, instead of one call."""

    def __init__(self, graph: Graph, node: Node, sizes: Sizes) -> None:
        super().__init__()
        self.graph, self.node, self.sizes = graph, node, sizes
        self.place = {k: node.meta[k] for k in KEPT_META if k in node.meta}
        given = {n: n.meta["val"] for n in node.all_input_nodes}
        self.found = {id(val): n for n, val in given.items()}
        self.given = {val.node.expr: n for n, val in given.items() if isinstance(val, torch.SymInt)}
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
        """What stands for the call's result, or for the parts of it that are used.

        Raises:
            CannotTakeApart: the parts are used together.
        """
        if isinstance(results, Tensor):
            return [(self.node, self._node(results))]
        parts = [user for user in self.node.users if user.target is operator.getitem]
        if len(parts) < len(self.node.users):
            raise CannotTakeApart("its results are used together")
        return [(part, self._node(results[part.args[1]])) for part in parts]

    def _add(self, target: Any, args: Any, kwargs: Any, val: Any) -> Node:
        call = self.graph.call_function(target, args, kwargs)
        call.meta.update(self.place, val=extract_val(val))  # which is not a view of another value
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
        if expr in self.given:
            return self.given[expr]
        return self.sizes.of(expr) if expr.is_Symbol else self._compute(expr)

    def _compute(self, expr: sympy.Expr) -> Node:
        """Adds calls that compute a size; not for others to use, so that equal layers stay equal."""
        symbols = {symbol: Proxy(self.sizes.of(symbol)) for symbol in sorted(expr.free_symbols, key=str)}
        new = self.node.prev
        result: Proxy = sympy_interp(PythonReferenceAnalysis, symbols, expr)
        while (new := new.next) is not self.node:
            args = map_arg(new.args, lambda n: n.meta["val"])
            new.meta.update(self.place, val=new.target(*args))  # type: ignore[operator]
        return result.node

"""Small helpers to edit a captured graph while keeping ``meta["val"]`` true."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, Node

KEPT_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "block")


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The mode under which the graph's fake tensors were made."""
    # The first one tells; looking at all of them, for every call that is added, would be quadratic.
    found = (n.meta.get("val") for n in graph.nodes)
    return next(val.fake_mode for val in found if isinstance(val, FakeTensor))


def value_of(target: Callable[..., Any], args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    """What a call would give, computed on fake tensors."""
    real_args, real_kwargs = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    # Without the python dispatcher some kernels would read symbolic sizes as the example's numbers.
    with mode, torch.no_grad(), enable_python_dispatcher():
        return target(*real_args, **real_kwargs)


def call(
    graph: Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    like: Node,
    mode: FakeTensorMode | None = None,
) -> Node:
    """Adds a call at the graph's insertion point; ``like`` tells where in the model it belongs."""
    node = graph.call_function(target, args, dict(kwargs or {}))
    node.meta.update({k: like.meta[k] for k in KEPT_META if k in like.meta})
    node.meta["val"] = value_of(target, args, kwargs or {}, mode or fake_mode(graph))
    return node


def behind(value: Node) -> Node:
    """The first node before which something computed from a value can stand."""
    after = value.next
    while after.op == "placeholder":
        after = after.next
    return after


def drop_unused(graph: Graph) -> bool:
    """Erases calls without users (a functional graph has no side effects); placeholders stay."""
    changed = False
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)
            changed = True
    return changed

"""Small helpers to edit a captured graph while keeping ``meta["val"]`` true."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from tpcompile.ir.torch_internals import FakeTensor, FakeTensorMode, enable_python_dispatcher

from .nodes import is_tensor

KEPT_META = ("nn_module_stack", "stack_trace", "source_fn_stack", "block", "custom")


def fake_mode(graph: Graph) -> FakeTensorMode:
    """The mode under which the graph's fake tensors were made."""
    # The first one tells; looking at all of them, for every call that is added, would be quadratic.
    found = (n.meta.get("val") for n in graph.nodes)
    return next(val.fake_mode for val in found if isinstance(val, FakeTensor))


def copied(graph: Graph) -> tuple[Graph, dict[Node, Node]]:
    """A graph of its own that says the same, and which of its nodes are copies of which."""
    copy, moved = Graph(), dict[Node, Node]()
    copy.output(copy.graph_copy(graph, moved))
    return copy, moved


def value_of(target: Callable[..., Any], args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    """What a call would give, computed on fake tensors."""
    real_args, real_kwargs = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    # That sizes of the example happen to be equal (a part of a weight on this rank, and the batch) is nothing
    # that the program may rely on: it would fix a symbol. What a call demands of sizes, capture has noted.
    free = mode.shape_env.suppress_guards() if mode.shape_env is not None else contextlib.nullcontext()
    # Without the python dispatcher some kernels would read symbolic sizes as the example's numbers.
    with mode, torch.no_grad(), enable_python_dispatcher(), free:
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


def call_before(
    node: Node, target: Callable[..., Any], *args: Any, like: Node | None = None, **kwargs: Any
) -> Node:
    """Adds a call before a node; ``like`` tells where in the model it belongs (by default: with the node)."""
    with node.graph.inserting_before(node):
        return call(node.graph, target, args, kwargs, like=like or node)


def cast_before(node: Node, value: Node, dtype: torch.dtype) -> Node:
    """A value in a type, by a call before a node where it has another."""
    if value.meta["val"].dtype == dtype:
        return value
    return call_before(node, torch.ops.aten._to_copy.default, value, dtype=dtype)


def call_behind(
    value: Node,
    target: Callable[..., Any],
    *args: Any,
    placement: Sequence[Any] | None = None,
    like: Node | None = None,
) -> Node:
    """Adds a call right behind a value.

    Args:
        value: a call, or an input: then the call stands behind all inputs.
        target: what is called.
        args: its arguments.
        placement: the result's, if values have any.
        like: tells where in the model the call belongs; by default where the value does.
    """
    with value.graph.inserting_before(behind(value)):
        node = call(value.graph, target, args, like=like or value)
    if placement is not None:
        node.meta["placement"] = placement
    return node


def replace(node: Node, *results: Node) -> None:
    """Has others read these values instead of a call's results; the call is erased."""
    if isinstance(node.meta["val"], torch.Tensor):
        node.replace_all_uses_with(results[0])
    else:
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def with_operands(node: Node, new: Iterable[Node]) -> tuple[Any, Any]:
    """A call's positional and keyword arguments, with others instead of its ``operands``, in that order."""
    values = iter(new)
    return torch.fx.node.map_aggregate(
        (node.args, node.kwargs),
        lambda arg: next(values) if isinstance(arg, Node) and is_tensor(arg) else arg,
    )


def behind(value: Node) -> Node:
    """The first node before which something computed from a value can stand."""
    after = value.next
    while after.op == "placeholder":
        after = after.next
    return after


def between(first: Node, last: Node) -> Iterator[Node]:
    """The nodes behind one and before another."""
    node = first.next
    while node is not last:
        yield node
        node = node.next


def readers_among(nodes: Iterable[Node], values: Collection[Node]) -> list[Node]:
    """Those of some nodes, given in the graph's order, that are computed from some values."""
    late, found = set(values), []
    for node in nodes:
        if node not in late and not late.isdisjoint(node.all_input_nodes):
            late.add(node)
            found.append(node)
    return found


def delay_readers(calls: Sequence[Node]) -> Node:
    """Moves what reads calls' results behind the last of them; returns the node that follows it."""
    first, last = calls[0], calls[-1]
    move_behind(last, readers_among(between(first, last), calls))
    return last.next


def move_behind(value: Node, nodes: Sequence[Node]) -> None:
    """Moves nodes behind another one, in their order."""
    for node in reversed(nodes):
        value.append(node)


def drop_unused(graph: Graph) -> bool:
    """Erases calls without users (a functional graph has no side effects); placeholders stay."""
    changed = False
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)
            changed = True
    return changed

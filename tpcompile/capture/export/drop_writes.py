"""Writes into tensors that nobody else sees, as the values that they leave behind.

``y = x.add_(z)`` is ``y = x.add(z)`` where x is new and nothing is a view of it; whoever used x later uses y.
If x was given, y is what it becomes. A write into a part of what is new, ``x[:, 0] = z``, is a
``select_scatter``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from tpcompile.ir.graph_edit import call
from tpcompile.ir.torch_internals import FakeTensorMode, OpOverload

from .aliases import may_alias

_SCATTERS: dict[Any, OpOverload] = {
    torch.ops.aten.select.int: torch.ops.aten.select_scatter.default,
    torch.ops.aten.slice.Tensor: torch.ops.aten.slice_scatter.default,
}
"""Views of a part, and what puts a part in its place."""


def drop_writes(graph: Graph, mode: FakeTensorMode, changeable: Collection[Node]) -> dict[Node, Node]:
    """Replaces the writes of a graph that have no other effect than a value; others stay.

    Args:
        graph: an exported program's.
        mode: the mode of its fake tensors.
        changeable: the placeholders that may be written; writes into others stay.

    Returns:
        Per placeholder that was written, the value that it has at the end.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    given: dict[Node, Node] = {}  # value -> the placeholder whose value it is
    for node in graph.nodes:
        target = without_write(node.target) if node.op == "call_function" else None
        if target is None or not isinstance(written := node.args[0], Node):
            continue
        if (views := _views_of_private(written, node, order)) is None:
            continue
        base: Any = views[-1].args[0] if views else written
        if base.op == "placeholder" and base not in changeable:
            continue
        with graph.inserting_before(node):
            new = call(graph, target, node.args, node.kwargs, like=node, mode=mode)
            if not _are_alike(new, written):
                graph.erase_node(new)
                continue
            for view in views:
                order[new] = order[node]
                args = (view.args[0], new, *view.args[1:])
                new = call(graph, _SCATTERS[view.target], args, like=node, mode=mode)
        order[new] = order[node]
        for user in list(base.users):
            if order[user] > order[new]:
                user.replace_input_with(base, new)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        if base.op == "placeholder" or base in given:
            given[new] = given.pop(base, base)
    return {placeholder: value for value, placeholder in given.items()}


def without_write(op: object) -> OpOverload | None:
    """The operator that computes what another one, which ends in ``_``, writes into its first argument."""
    if not isinstance(op, OpOverload) or op.namespace != "aten" or not op._schema.is_mutable:
        return None
    written = [a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments]
    name = op._schema.name.removeprefix("aten::")
    writes = name.endswith("_") and name != "set_"  # which has its argument share another one's memory
    packet = getattr(torch.ops.aten, name[:-1], None) if writes else None
    if (
        written[:1] != [True]
        or any(written[1:])
        or op._overloadname not in getattr(packet, "overloads", list)()
    ):
        return None
    found: OpOverload = getattr(packet, op._overloadname)
    return None if found._schema.is_mutable else found


def _is_private(tensor: Node, writer: Node) -> bool:
    """Whether nobody else sees a tensor's memory: it is new or given, or the only view of what is new; it
    has no views."""
    if tensor.op == "get_attr" or any(_may_view(user, tensor) for user in tensor.users if user is not writer):
        return False
    if tensor.op == "placeholder" or not may_alias(tensor):
        return True
    viewed = tensor.args[0]
    if not isinstance(viewed, Node) or viewed.op == "placeholder" or len(viewed.users) > 1:
        return False
    return _is_private(viewed, tensor)


def _views_of_private(written: Node, writer: Node, order: Mapping[Node, int]) -> list[Node] | None:
    """The views, from the last one on, through which a call writes into what nobody else sees.

    Returns:
        None where somebody may see it: through a view that was taken before, or by the call's result.
    """
    if _is_private(written, writer):
        return []
    views, user, base = list[Node](), writer, written
    while base.target in _SCATTERS and len(base.users) == 1 and not base.kwargs:
        views.append(base)
        user, base = base, base.args[0]  # type: ignore[assignment]
    if not views or writer.users or base.op != "call_function" or may_alias(base):
        return None
    others = (other for other in base.users if other is not user and _may_view(other, base))
    return views if all(order[other] > order[writer] for other in others) else None


def _may_view(user: Node, tensor: Node) -> bool:
    """Whether a call's result may be a view of a tensor: of what a write only reads it is none."""
    reads = without_write(user.target) is not None and user.args[0] is not tensor
    return may_alias(user) and not reads


def _are_alike(one: Node, other: Node) -> bool:
    a, b = one.meta["val"], other.meta["val"]
    return bool(a.dtype == b.dtype and str(a.shape) == str(b.shape))

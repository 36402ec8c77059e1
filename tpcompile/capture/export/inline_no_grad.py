"""Inlines the subgraphs that export makes of grad-mode regions, before they lose their meaning."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import tree_leaves

from .aliases import returned_argument

_GRAD_REGION = torch.ops.higher_order.wrap_with_set_grad_enabled
_AUTOCAST_REGION = torch.ops.higher_order.wrap_with_autocast
_detach = torch.ops.aten.detach.default


def inline_regions(gm: GraphModule, *, grad_enabled: bool, tainted: set[Node]) -> None:
    """Replaces each ``wrap_with_set_grad_enabled`` call with its body, outputs detached where grad is off.

    ``run_decompositions`` would inline the body WITHOUT detaching: gradients would then flow where the
    model says ``torch.no_grad()``. Autocast regions stay for it: it runs their bodies under autocast,
    which records the casts; only grad regions inside of them are inlined here.

    Args:
        gm: an exported graph before decomposition, changed in place.
        grad_enabled: the grad mode around ``gm``.
        tainted: nodes whose value can carry a gradient; grows with what depends on them.
    """
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and tainted.intersection(node.all_input_nodes):
            tainted.add(node)
        if node.target is _GRAD_REGION:
            enabled, body = bool(node.args[0]), _body(gm, node.args[1])
            arguments = node.args[2:]
            inside = _tainted_inputs(body, arguments, tainted)
            inline_regions(body, grad_enabled=enabled, tainted=inside)
            _inline(gm, node, body, detach=grad_enabled and not enabled, tainted=tainted)
        elif node.target is _AUTOCAST_REGION:
            body = _body(gm, node.args[4])
            inside = _tainted_inputs(body, node.args[5:], tainted)
            inline_regions(body, grad_enabled=grad_enabled, tainted=inside)
            _hand_through(gm, node, body)
    gm.graph.lint()
    gm.delete_all_unused_submodules()
    gm.recompile()


def _body(gm: GraphModule, reference: Any) -> GraphModule:
    body = gm.get_submodule(reference.target)
    assert isinstance(body, GraphModule)
    return body


def _tainted_inputs(body: GraphModule, arguments: tuple[Any, ...], tainted: set[Node]) -> set[Node]:
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    return {p for p, argument in zip(placeholders, arguments, strict=True) if argument in tainted}


def _inline(gm: GraphModule, call: Node, body: GraphModule, *, detach: bool, tainted: set[Node]) -> None:
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    copies: dict[Node, Node] = dict(zip(placeholders, call.args[2:], strict=True))  # type: ignore[arg-type]
    outer = {node for node in copies.values() if isinstance(node, Node)}
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "get_attr":
                copies[node] = _copy_attribute(gm, body, node)
            elif (same := returned_argument(node)) is not None:
                copies[node] = copies[same]
            elif node.op not in ("placeholder", "output"):
                copies[node] = gm.graph.node_copy(node, copies.__getitem__)
                if detach:
                    _guard_mutation(gm, copies[node], outer, tainted)
        results = body.graph.output_node().args[0]
        values = [copies[result] for result in results]  # type: ignore[union-attr, index]
        if detach:
            values = [value if value in outer else _detached(gm, value) for value in values]
        elif tainted.intersection(outer):
            tainted.update(values)
    for user in list(call.users):
        user.replace_all_uses_with(values[user.args[1]])  # type: ignore[index]
        tainted.discard(user)
        gm.graph.erase_node(user)
    tainted.discard(call)
    gm.graph.erase_node(call)


def _hand_through(gm: GraphModule, call: Node, body: GraphModule) -> None:
    """Lets who uses an argument that an autocast region hands back as it is use the argument itself."""
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    outer = dict(zip(placeholders, call.args[5:], strict=True))
    for user in list(call.users):
        result: Any = body.graph.output_node().args[0][user.args[1]]  # type: ignore[index]
        while (same := returned_argument(result)) is not None:
            result = same
        if result in outer:
            user.replace_all_uses_with(outer[result])
            gm.graph.erase_node(user)


def _copy_attribute(gm: GraphModule, body: GraphModule, node: Node) -> Node:
    value: Any = body
    for atom in str(node.target).split("."):
        value = getattr(value, atom)
    name = str(node.target).replace(".", "_")
    while hasattr(gm, name):
        name += "_"
    setattr(gm, name, value)
    copy = gm.graph.get_attr(name)
    copy.meta = dict(node.meta)
    return copy


def _detached(gm: GraphModule, value: Node) -> Node:
    if not isinstance(value.meta.get("val"), torch.Tensor):
        return value
    detached = gm.graph.call_function(_detach, (value,))
    detached.meta = dict(value.meta)
    return detached


def _guard_mutation(gm: GraphModule, node: Node, outer: set[Node], tainted: set[Node]) -> None:
    """Keep gradients out of a tensor that is changed in place inside a no-grad region.

    Functionalised, ``buffer.add_(x)`` is ``buffer + x`` and would carry x's gradient. Where the changed
    tensor itself carries one, autograd treats the change as invisible, which no functional graph says.
    """
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return
    changed = [
        node.args[i]
        for i, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write and i < len(node.args)
    ]
    if any(isinstance(n, Node) and n in outer and n in tainted for n in tree_leaves(changed)):
        raise TpCompileError(
            "a tensor that needs a gradient is changed in place under torch.no_grad()",
            where=str(node.meta.get("stack_trace", "")).strip() or str(node),
            todo="make a new tensor instead of changing the old one",
        )
    for argument in node.all_input_nodes:
        if argument not in changed and isinstance(argument.meta.get("val"), torch.Tensor):
            with gm.graph.inserting_before(node):
                node.replace_input_with(argument, _detached(gm, argument))

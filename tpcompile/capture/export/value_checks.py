"""Checks of values (``torch._check``, ``torch._assert_async``) become results, which every call looks at.

Checks of sizes are dropped: ranges, guards and the call's key hold what they protect.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from tpcompile.errors import OnlyInParts
from tpcompile.ir.graph_edit import call_before
from tpcompile.ir.nodes import ancestors, is_tensor, module_path, source_line

from .specs import OutputSpec

aten = torch.ops.aten
_ASSERTIONS = ("aten._assert_async", "aten._functional_assert_async")
_CONDITIONS = ("aten._assert_scalar", "aten._functional_assert_scalar")
_FORMS = tuple(
    f"aten.{name}"
    for name in ("_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size")
)
_NUMBERS = (aten.item.default, aten._local_scalar_dense.default)
_OPERATORS: dict[Any, str] = {
    getattr(operator, name): name for name in ("ge", "gt", "le", "lt", "eq", "ne", "add", "mul")
}
_KINDS: dict[type, Any] = {torch.SymBool: bool, torch.SymInt: int, torch.SymFloat: float}
_TURNED = {"ge": "le", "gt": "lt", "le": "ge", "lt": "gt"}


def take_checks(graph: Graph) -> list[tuple[OutputSpec, Node]]:
    """Takes assertions out of a graph that was traced.

    Returns:
        Those of values: where in the model with the message, and the tensor that must be true.

    Raises:
        OnlyInParts: a check of values cannot be said in tensors.
    """
    found: dict[Node, OutputSpec] = {}

    def add(node: Node, condition: Any, text: str = "") -> None:
        if isinstance(condition, Node) and is_tensor(condition) and condition not in found:
            place = ", ".join(part for part in (module_path(node), source_line(node)) if part)
            found[condition] = OutputSpec("check", f"{len(found)}: {place}", text)

    for node in list(graph.nodes):
        name = str(node.target).removesuffix(".default").removesuffix(".msg")
        if node.target in _NUMBERS:
            add(node, _known(node))
        elif name in (*_ASSERTIONS, *_CONDITIONS, *_FORMS) and not node.users:
            if name in _CONDITIONS:
                add(node, _tensor_of(node, node.args[0]))
            elif name in _ASSERTIONS:
                add(node, node.args[0], *map(str, node.args[1:2]))
            graph.erase_node(node)
    return [(spec, condition) for condition, spec in found.items()]


def _known(number: Node) -> Node | bool:
    """What must be true of a tensor whose number torch has put in: it does where a check says what it is."""
    (tensor,), value = number.args, number.meta["val"]
    assert isinstance(tensor, Node)
    kind = _KINDS.get(type(value))
    if kind is None or value.node.expr.free_symbols:
        return True
    return _compared(number.next, "eq", tensor, kind(value))


def _tensor_of(check: Node, value: Any) -> Any:
    """What a condition on numbers is, computed with the tensors that they were taken from.

    Numbers that come from no tensor stay as they are.

    Raises:
        OnlyInParts: it is computed in another way.
    """
    if not isinstance(value, Node) or not any(n.target in _NUMBERS for n in (value, *ancestors([value]))):
        return value
    if value.target in _NUMBERS:
        return value.args[0]
    if value.target is torch.sym_ite and value.args[1:] == (1, 0):  # a truth value as a number
        return _tensor_of(check, value.args[0])
    if value.target is torch.sym_not:
        return call_before(check, aten.logical_not.default, _tensor_of(check, value.args[0]))
    if value.target not in _OPERATORS:
        raise OnlyInParts(
            f"the model's forward checks a value by {value.target}, which a program cannot",
            where=source_line(check),
            todo="check a tensor, with torch._assert_async; or parallelize(compose=True)",
        )
    one, two = (_tensor_of(check, arg) for arg in value.args)
    name = _OPERATORS[value.target]
    if not (isinstance(one, Node) and is_tensor(one)):
        one, two, name = two, one, _TURNED.get(name, name)
    return _compared(check, name, one, two)


def _compared(before: Node, name: str, one: Node, two: Any) -> Node | bool:
    """A tensor and a tensor or a number by an operator of aten; whether it is so, if it always is."""
    if one.meta["val"].dtype == torch.bool and isinstance(two, int):
        no, yes = (bool(getattr(operator, name)(number, two)) for number in (0, 1))
        if no == yes:
            return yes
        return one if yes else call_before(before, aten.logical_not.default, one)
    overload = "Tensor" if isinstance(two, Node) and is_tensor(two) else "Scalar"
    return call_before(before, getattr(getattr(aten, name), overload), one, two)

"""What a node of a captured graph says: its operands, results and options, and its place in the model."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from tpcompile.ir.torch_internals import OpOverload, OpOverloadPacket

from .sizes import Size, sizes_of

OWN_NAMESPACES = ("aten", "prims", "tpcompile")
"""Of torch's operators, and of ours."""
PYTHON_RUNS = ("tpcompile.local_module", "tpcompile.opaque_module", "tpcompile.autograd_function")
"""Those of ours that run python of the user's, in all of their overloads."""


def runs_others(node: Node) -> bool:
    """Whether a node's operator is neither torch's nor ours, or one that runs python of the user's."""
    if not isinstance(node.target, OpOverload):
        return False
    space, name = node.target.namespace, node.target._opname
    return space not in OWN_NAMESPACES or f"{space}.{name}" in PYTHON_RUNS


def operands(node: Node) -> list[Node]:
    """The tensor-valued arguments of a node, in order, repeated ones repeated."""
    found: list[Node] = []

    def visit(arg: Any) -> Any:
        if isinstance(arg, Node) and isinstance(arg.meta.get("val"), torch.Tensor):
            found.append(arg)
        return arg

    torch.fx.node.map_aggregate((node.args, node.kwargs), visit)
    return found


def results(node: Node) -> list[torch.Tensor]:
    """The tensors that a node computes (several for an operator that returns a tuple)."""
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor):
        return [val]
    return [v for v in val if isinstance(v, torch.Tensor)] if isinstance(val, list | tuple) else []


def is_tensor(node: Node) -> bool:
    """Whether a node's value is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def tensor_of(value: Node) -> torch.Tensor:
    """The (fake, global) tensor of a value."""
    val = value.meta["val"]
    assert isinstance(val, torch.Tensor)
    return val


def shape(node: Node) -> tuple[Size, ...]:
    """The shape of a node's (first) result."""
    return sizes_of(results(node)[0])


def producer(value: Node) -> tuple[Node, int]:
    """The node that computes a value, and which of its tensor results the value is."""
    if value.target is operator.getitem:
        source, index = value.args
        assert isinstance(source, Node) and isinstance(index, int)
        val = source.meta["val"]
        return source, sum(isinstance(v, torch.Tensor) for v in val[:index])
    return value, 0


def arguments(node: Node) -> tuple[Any, ...]:
    """A node's positional arguments. What they are depends on the operator, so their type is open."""
    return node.args


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or keyword."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def option(node: Node, name: str, default: Any = None) -> Any:
    """An argument by its name in the operator's schema, or the schema's default, or ``default``.

    Overloads of one operator have the same option in different places: this finds it in all.
    """
    if name in node.kwargs:
        return node.kwargs[name]
    if isinstance(node.target, OpOverload):
        for i, declared in enumerate(node.target._schema.arguments):
            if declared.name == name:
                given = i < len(node.args) and not declared.kwarg_only
                value = node.args[i] if given else declared.default_value
                return default if value is None else value
    return default


def op_name(node: Node) -> str:
    """``add`` for ``aten.add.Tensor``."""
    target = node.target
    return target._schema.name.split("::")[1] if isinstance(target, OpOverload) else str(target)


def module_path(node: Node) -> str:
    """The innermost module that a node was traced in, by its qualified name."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return str(paths[-1]) if paths else ""


def source_line(node: Node) -> str:
    """The line of the model's source that a node was traced from."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    return lines[-2] if len(lines) > 1 else ""


def find_operator(name: str) -> OpOverload | OpOverloadPacket | None:
    """The operator of a name such as ``aten.mm`` or ``aten.mm.default``, if there is one."""
    library, _, rest = name.partition(".")
    found: Any = getattr(torch.ops, library, None) if rest else None
    for step in rest.split("."):
        found = getattr(found, step, None)
    return found if isinstance(found, OpOverload | OpOverloadPacket) else None


def overloads_of(op: OpOverload | OpOverloadPacket) -> list[OpOverload]:
    """An overload itself, or all of an operator's."""
    return [op] if isinstance(op, OpOverload) else [getattr(op, name) for name in op.overloads()]


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """All that some values are computed from."""
    found, todo = set[Node](), list(nodes)
    while todo:
        new = [node for node in todo.pop().all_input_nodes if node not in found]
        found.update(new)
        todo += new
    return found


def is_number(value: torch.Tensor) -> bool:
    """Whether a tensor is a single number with a fraction, as a loss is."""
    return value.ndim == 0 and value.dtype.is_floating_point


def has_fractions(value: torch.Tensor) -> bool:
    """Whether a tensor is of real or complex numbers: only such round, and have gradients."""
    return value.dtype.is_floating_point or value.dtype.is_complex

"""A rank's graph as JSON, and back: operators by name, of which only torch's and ours are read."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from tpcompile.errors import TpCompileError
from tpcompile.ir.nodes import OWN_NAMESPACES, PYTHON_RUNS, module_path
from tpcompile.ir.torch_internals import OpOverload, dispatch_has_kernel

from .values import decode, encode

_OPERATOR = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "getitem")
_COMPARED = ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")
_SYMBOLIC = ("sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite", "sym_sum")
_PYTHON: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in (*_OPERATOR, *_COMPARED)},
    **{f"torch.{name}": getattr(torch, name) for name in _SYMBOLIC},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc")},
}
_PYTHON_NAMES = {function: name for name, function in _PYTHON.items()}
_REFUSED = ("aten.from_file", *PYTHON_RUNS)
"""What opens files, and what runs python of the user's, in all of their overloads."""
_GROUP = "group"


@dataclass(frozen=True)
class _Group:
    """A process group among an operator's arguments: the sub-axes that it is over."""

    axes: tuple[int, ...]


def graph_data(graph: Graph, groups: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """A graph as JSON: its calls and its results; values are numbered as they come, inputs first.

    Args:
        graph: a rank's.
        groups: per process group that it names, the sub-axes that it is over.

    Raises:
        TpCompileError: it calls what is not saved.
    """
    numbers: dict[Node, int] = {}

    def refer(value: Any) -> Any:
        if isinstance(value, Node):
            return {"node": numbers[value]}
        return {"group": list(value.axes)} if isinstance(value, _Group) else None

    calls = []
    numbers.update((node, at) for at, node in enumerate(graph.find_nodes(op="placeholder")))
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        numbers[node] = len(numbers)
        args, kwargs = _with_groups(node, groups)
        named = {key: encode(value, refer) for key, value in kwargs.items()}
        calls.append([_name(node), [encode(arg, refer) for arg in args], named])
    return {"calls": calls, "results": encode(graph.output_node().args[0], refer)}


def graph_of(
    data: Mapping[str, Any], inputs: int, group_name: Callable[[tuple[int, ...]], str], device: torch.device
) -> GraphModule:
    """The graph that ``graph_data`` made JSON of.

    Args:
        data: the JSON.
        inputs: how many it has.
        group_name: gives the name of this rank's process group over sub-axes.
        device: this rank's.

    Raises:
        ValueError: it is something else, or calls what a saved program may not call.
    """
    graph = Graph()
    values = [graph.placeholder(f"input_{at}") for at in range(inputs)]

    def refer(kind: str, value: Any) -> Any:
        if kind == "node" and type(value) is int and 0 <= value < len(values):
            return values[value]
        if kind == "group":
            return group_name(tuple(value))
        raise ValueError(f"{kind} {value} is not a value")

    for name, args, kwargs in data["calls"]:
        given = tuple(decode(arg, device, refer) for arg in args)
        named = {key: decode(value, device, refer) for key, value in kwargs.items()}
        if not all(key.isidentifier() and not iskeyword(key) for key in named):  # fx writes them into code
            raise ValueError(f"{name} has an argument without a name")
        values.append(graph.call_function(_target(name), given, named))
    graph.output(decode(data["results"], device, refer))
    graph.lint()
    return GraphModule(nn.Module(), graph, "SavedProgram")


def _with_groups(node: Node, groups: Mapping[str, Sequence[int]]) -> tuple[list[Any], dict[str, Any]]:
    """A call's arguments, process groups by their sub-axes: the names are of this start's."""
    args: list[Any] = list(node.args)
    if isinstance(node.target, OpOverload) and node.target.namespace == "tpcompile":
        for at, argument in enumerate(node.target._schema.arguments):
            if argument.name == _GROUP and at < len(args):
                args[at] = _Group(tuple(groups[args[at]]))
    return args, dict(node.kwargs)


def _name(node: Node) -> str:
    """What a call is saved by.

    Raises:
        TpCompileError: it is neither torch's nor ours.
    """
    target: Any = node.target
    name = str(target) if isinstance(target, OpOverload) else _PYTHON_NAMES.get(target, "")
    try:
        _target(name)
    except ValueError:
        raise TpCompileError(
            f"{name or node.target} cannot be saved: it runs code that is not torch's",
            where=module_path(node) or node.name,
            todo="save a model without custom operators, autograd functions and custom strategies",
        ) from None
    return name


def _target(name: str) -> Any:
    """The operator of a name: one of torch's that are dispatched, so neither TorchScript's nor python's.

    Raises:
        ValueError: there is none that a saved program may call.
    """
    if name in _PYTHON:
        return _PYTHON[name]
    space, *rest = name.split(".")
    if space in OWN_NAMESPACES and len(rest) == 2 and f"{space}.{rest[0]}" not in _REFUSED:
        qualified = f"{space}::{rest[0]}" + ("" if rest[1] == "default" else f".{rest[1]}")
        packet = getattr(getattr(torch.ops, space), rest[0], None)
        found = getattr(packet, rest[1], None)
        if isinstance(found, OpOverload) and dispatch_has_kernel(qualified):
            return found
    raise ValueError(f"a saved program may not call {name!r}")

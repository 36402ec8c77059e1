"""The one printer of graphs: its text is the log, the golden tests and ``print_graph``."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from tpcompile.ir.torch_internals import OpOverload


def graph_text(graph: Graph) -> str:
    """A line per node: ``name: f32[2, s, 64] S(2) = aten.linear(x, w)``."""
    return "\n".join(node_text(node) for node in graph.nodes)


def node_text(node: Node) -> str:
    """One node as a line."""
    if node.op == "output":
        return f"return {_arguments(node.args)}"
    head = f"{node.name}: {_value(node.meta.get('val'))}"
    if "placement" in node.meta:
        head += f" {' x '.join(map(str, node.meta['placement']))}"
    if node.op == "placeholder":
        return head
    return f"{head} = {target_text(node)}({_arguments(node.args, node.kwargs)})"


def target_text(node: Node) -> str:
    """The operator's short name: ``aten.linear`` for the default overload, ``aten.add.Tensor`` else."""
    if isinstance(node.target, OpOverload):
        return str(node.target).removesuffix(".default")
    if node.target is operator.getitem:
        return "getitem"
    return getattr(node.target, "__name__", str(node.target))


def _value(val: Any) -> str:
    if isinstance(val, torch.Tensor):
        names = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16", "bool": "b8"}
        kind = str(val.dtype).removeprefix("torch.")
        kind = names.get(kind, kind.replace("int", "i"))
        return f"{kind}[{', '.join(map(str, val.shape))}]"
    if isinstance(val, list | tuple):
        return f"({', '.join(map(_value, val))})"
    return str(val)


def _arguments(args: Any, kwargs: Any = None) -> str:
    parts = [_argument(a) for a in args]
    parts += [f"{k}={_argument(v)}" for k, v in (kwargs or {}).items()]
    return ", ".join(parts)


def _argument(arg: Any) -> str:
    if isinstance(arg, list | tuple):
        return f"[{', '.join(map(_argument, arg))}]"
    if isinstance(arg, int) and not isinstance(arg, bool) and arg == 2**63 - 1:
        return "end"
    if isinstance(arg, torch.device):
        return arg.type  # ranks that sit on different cards have the same program
    return str(arg)

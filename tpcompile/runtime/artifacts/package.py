"""AOTInductor packages: a rank's graph of one call as native code, for the sizes that it was saved with."""

from __future__ import annotations

import platform
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from tpcompile.errors import TpCompileError, refusing
from tpcompile.ir.markers import Axes
from tpcompile.ir.torch_internals import (
    OpOverload,
    register_process_group,
    resolve_process_group,
    unregister_process_group,
)
from tpcompile.ranks.own_groups import find_group
from tpcompile.rules.randomness import random_nodes

from ..await_collectives import await_collectives

_ALIGNED = 16
"""Bytes; code is compiled for inputs that begin at a multiple of them."""


def machine(device: torch.device) -> str:
    """What native code is compiled for, as text."""
    kind = torch.cuda.get_device_capability(device) if device.type == "cuda" else device.type
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {kind}"


@dataclass(frozen=True)
class Package:
    """Native code of a rank's graph.

    Attributes:
        runs: the code.
        layouts: of each input: its type, sizes and strides.
        results: the graph's results; None for those that the code gives.
    """

    runs: Any
    layouts: Sequence[Any]
    results: Sequence[Any]

    def run(self, inputs: Sequence[Any]) -> list[Any] | None:
        """The graph's results; None for inputs that the code is not for."""
        if [_layout(x) for x in inputs] != self.layouts:
            return None
        given = iter(self.runs(*inputs))
        return [next(given) if kept is None else kept[0] for kept in self.results]


def _layout(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.data_ptr() % _ALIGNED:
        return None
    return [str(value.dtype), list(value.shape), list(value.stride())]


def refuse_unpackable(graph_module: GraphModule, inputs: Sequence[Any], call: str) -> None:
    """Refuses a graph that cannot be native code.

    Raises:
        TpCompileError: it is given, or gives, what is not a tensor, or one that it was given; or it writes,
            or draws random numbers.
    """
    graph = graph_module.graph
    results: Any = graph.output_node().args[0]
    writes = any(isinstance(n.target, OpOverload) and n.target._schema.is_mutable for n in graph.nodes)
    if drawn := next(iter(random_nodes(graph)), None):
        raise TpCompileError(
            "native code draws random numbers of its own, other ones on every rank",
            where=f"{call}: {drawn.target}",
            todo="save the program without package=True",
        )
    if writes or not all(map(_may_return, results)) or None in map(_layout, inputs):
        raise TpCompileError(
            "native code gives new tensors: a call has numbers, hands on what it is given, or writes to it",
            where=call,
            todo="save the program without package=True",
        )


def compile_package(
    graph_module: GraphModule, inputs: Sequence[Any], names: Mapping[str, Axes], path: Path
) -> dict[str, Any]:
    """Compiles a rank's graph for inputs of these sizes; what is to be known of the file, as JSON.

    Args:
        graph_module: the graph; it stays as it is.
        inputs: what it is given.
        names: of process groups, and their sub-axes. The code has its own ones: in another process groups
            have other names, and these may be names of others.
        path: the file.

    Raises:
        TpCompileError: torch cannot compile it.
    """
    layouts = [_layout(x) for x in inputs]
    copy, moved = Graph(graph_module), dict[Node, Node]()
    results: Any = copy.graph_copy(graph_module.graph, moved)
    own = {name: f"tpcompile {secrets.token_hex(8)}" for name in names}

    def renamed(value: Any) -> Any:
        return own.get(value, value) if type(value) is str else value

    for node in copy.nodes:
        node.args, node.kwargs = map_aggregate((node.args, node.kwargs), renamed)
    copy.output(tuple(x for x in results if isinstance(x, Node)))
    aliases = {own[name]: list(axes) for name, axes in names.items()}
    module = GraphModule(graph_module, copy)
    with refusing("torch cannot compile a package", where=str(path), todo="save it without package=True"):
        register_names({own[name]: name for name in names})  # Inductor asks for them
        exported = torch.export.export(_Plain(module), tuple(x.detach() for x in inputs), strict=False)
        functional = exported.run_decompositions()
        await_collectives(functional.graph)
        torch._inductor.aoti_compile_and_package(functional, package_path=str(path))
    for name in own.values():
        unregister_process_group(name)  # type: ignore[arg-type]
    kept = [None if isinstance(x, Node) else [x] for x in results]
    return {"file": path.name, "groups": aliases, "layouts": layouts, "results": kept}


def register_names(names: Mapping[str, str]) -> None:
    """Gives process groups the names that native code has for them.

    Raises:
        ValueError: the code is loaded already, and has other groups there.
    """
    for own, name in names.items():
        group = find_group(own, None)
        if group is None:
            unregister_process_group(own)  # type: ignore[arg-type]  # of a group that was destroyed
            register_process_group(own, resolve_process_group(name))  # type: ignore[arg-type]
        elif group.group_name != name:
            raise ValueError("this process has loaded its packages over another mesh")


def _may_return(value: Any) -> bool:
    if isinstance(value, Node):
        return isinstance(value.meta.get("val"), Tensor) and value.op != "placeholder"
    return value is None or type(value) in (bool, int, float, str)


class _Plain(nn.Module):
    """A graph as a module of its own, whatever names its parameters have."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any) -> Any:
        return self.module(*inputs)

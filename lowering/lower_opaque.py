"""Calls of custom strategies' modules become calls of these modules on local tensors."""

from __future__ import annotations

import torch
from torch.fx import Node

from tpcompile.errors import TpCompileError
from tpcompile.ir.module_tensors import every_name
from tpcompile.ir.nodes import arguments

from .local_module import LocalModule, Whole
from .state import Lowering

LOCAL_MODULE = "local_module"
"""The key of a local node's meta data that holds its module: it lives as long as the graph."""


def lower_opaque(low: Lowering, node: Node) -> Node:
    """The local call of a custom strategy's module; its local shape is what was declared."""
    inputs, weights, key = arguments(node)[:3]
    made = low.local_modules.get(key)
    if made is None:
        made = low.local_modules[key] = _make(low, key)
    sizes = [s if isinstance(s, int) else -1 for s in low.shapes.shape(node, node.meta["placement"])]
    args = (low.map(inputs), low.map(weights), made.handle, sizes)
    local = low.emit_as(torch.ops.tpcompile.local_module.default, args, low.part(node), like=node)
    local.meta[LOCAL_MODULE] = made
    return local


def _make(low: Lowering, key: str) -> LocalModule:
    custom = low.program.custom
    path, module = custom.templates[key]
    mesh = custom.mesh
    if mesh is None:
        raise TpCompileError(
            "custom strategies need a mesh to run on", where=key, todo="give parallelize a mesh"
        )
    wholes: list[Whole | None] = []
    for name, _ in every_name(module):
        parts = custom.parts.get(f"{path}.{name}")
        placements = parts[0].placements if parts else None
        if placements is None:
            wholes.append(None)
        else:
            shape = custom.shapes[f"{path}.{name}"]
            wholes.append((placements, shape, torch.empty(shape, device="meta").stride()))
    return LocalModule(module, custom.strategies[path], mesh, tuple(wholes))

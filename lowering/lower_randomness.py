"""Gives the random numbers of one rank's graph their seed, and the places of the rank's elements."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from tpcompile.errors import TpCompileError
from tpcompile.ir import random_numbers as _registers_the_operator  # noqa: F401
from tpcompile.ir.graph_edit import fake_mode, value_of
from tpcompile.ir.nodes import arguments, module_path
from tpcompile.ir.placements import Filled, Shard

from .state import Groups, Lowering

aten = torch.ops.aten
ops = torch.ops.tpcompile
UNIFORM = ops.uniform.default
SEED = 1 << 32


def lower_uniform(low: Lowering, node: Node) -> Node:
    """The local call: which elements of the whole this rank has; the seed comes last.

    Raises:
        TpCompileError: the elements cannot be numbered: a dynamic factor is inside of a sharded one.
    """
    like: Node = arguments(node)[0]
    placements = node.meta["placement"]
    parts: list[Any] = []
    held = low.shapes.atoms(node, placements)
    for dim in sorted({p.dim for p in placements if isinstance(p, Shard)}):
        parts += [dim, len(held[dim])]
        for factor, (whole, mine) in enumerate(
            zip(low.shapes.factors.atom_sizes(node)[dim], held[dim], strict=True)
        ):
            if factor and not (isinstance(whole, int) and isinstance(mine, int)):
                raise TpCompileError(
                    "random numbers along a dimension with a dynamic factor inside of a divided one",
                    where=module_path(node) or node.name,
                    todo="capture with dynamic=False",
                )
            divided = Shard(dim, factor) in placements
            start = low.shapes.start(node, placements, Shard(dim, factor)) if divided else 0
            parts += [whole if isinstance(whole, int) else 0, mine if isinstance(mine, int) else 1, start]
    for place in {p for p in placements if isinstance(p, Filled)}:
        axes = tuple(a for a, p in enumerate(placements) if p == place)
        local = low.map(like)
        size = low.emit(aten.sym_size.int, local, place.dim, like=node)
        first = low.emit(operator.mul, size, low.groups.index(axes), like=node)
        parts += [place.dim, 1, 0, 1, first]
    # Seed and stream come last: layers that repeat must look alike until then.
    return low.emit(UNIFORM, low.map(like), None, 0, parts, like=node)


def seed_graph(graph: Graph, groups: Groups, axis_count: int) -> None:
    """Draws a seed per call, the first rank's for all, and numbers the streams: no two calls share one.

    The seed comes from the default generator, on every rank, so that ``torch.manual_seed`` and what
    restores the generator's state (activation checkpointing) have their usual effect.
    """
    drawing = graph.find_nodes(op="call_function", target=UNIFORM)
    if not drawing:
        return
    mode = fake_mode(graph)
    device = arguments(drawing[0])[0].meta["val"].device
    every = tuple(range(axis_count))
    first = min(drawing, key={n: i for i, n in enumerate(graph.nodes)}.__getitem__)

    def add(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        node = graph.call_function(target, args, kwargs)
        node.meta["val"] = value_of(target, args, kwargs, mode)
        return node

    with graph.inserting_before(first):
        own = add(aten.randint.low, 0, SEED, [2], dtype=torch.int64, device=device)
        kept = add(ops.keep_first.default, own, groups.index(every))
        seed = add(ops.all_reduce.default, kept, groups.name(every))
    for number, node in enumerate(drawing):
        like, _, _, parts = arguments(node)
        node.args = (like, seed, number, parts)

"""What a rank's graph sends, as text, for comparison with the other ranks'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch.fx import Graph, Node

from tpcompile.ir.torch_internals import OpOverload, resolve_process_group
from tpcompile.ranks.compare_sent import Sent

from .state import STANDS_FOR

_DIVIDED = ("dim", "src_dim")
"""Arguments that name a dimension in which ranks hold different sizes."""


def members_of(group: Any) -> tuple[int, ...]:
    """The ranks of a process group, by its name."""
    found: Any = resolve_process_group(group)
    return tuple(dist.get_process_group_ranks(found))


def groups_of(graph: Graph) -> set[str]:
    """The names of the groups that a lowered graph sends over."""
    return {given["group"] for _, given in _collectives(graph)}


def sent_by(graph: Graph, members_of: Callable[[str], tuple[int, ...]] = members_of) -> list[Sent]:
    """The collectives of a lowered graph, in their order.

    Args:
        graph: a rank's graph.
        members_of: the ranks of a group, by the name that the graph has for it.
    """
    found = []
    for name, given in _collectives(graph):
        members = members_of(given["group"])
        found.append(Sent(f"{name} over {len(members)} ranks", members, _facts(given)))
    return found


def _collectives(graph: Graph) -> Iterator[tuple[str, dict[str, Any]]]:
    """The operators that have a group, by name, and what they are given."""
    for node in graph.nodes:
        if isinstance(node.target, OpOverload) and node.target.namespace == "tpcompile":
            names = (argument.name for argument in node.target._schema.arguments)
            given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            if "group" in given:
                yield node.target._opname, given


def _facts(given: dict[str, Any]) -> str:
    """What all ranks give alike: not the rank's index, nor its size of the dimension that is divided.

    Named after the global value: two sums of one shape in another order would be added to each other.
    """
    if "xs" in given:
        return "; ".join(_facts({"x": x}) for x in given["xs"])
    divided = [given[name] for name in _DIVIDED if name in given]
    val = given["x"].meta["val"]
    named = [f" of {name}" for name, _ in given["x"].meta.get(STANDS_FOR) or ()][:1]
    shape = ["-" if dim in divided else _size(size) for dim, size in enumerate(val.shape)]
    rest = {name: value for name, value in given.items() if name not in ("x", "group", "index")}
    told = [f", {name} {value}" for name, value in rest.items() if not isinstance(value, Node)]
    return f"{val.dtype} [{', '.join(shape)}]{''.join([*told, *named])}"


def _size(size: Any) -> str:
    return str(size) if isinstance(size, int) else "any"

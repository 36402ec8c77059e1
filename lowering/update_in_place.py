"""Lets a lowered graph write into the tensors of the caches that it is given, instead of making new ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from tpcompile.capture.caches.paged import is_pooled
from tpcompile.capture.export.specs import OutputSpec
from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import OpOverload

aten = torch.ops.aten


def update_in_place(module: GraphModule, outputs: Sequence[OutputSpec], given: Mapping[str, Node]) -> None:
    """Replaces ``new = op(old, ...)`` with ``op_(old, ...)`` where the call's ``old`` is to become ``new``.

    A static cache would otherwise be copied whole for every token. Where the operator has no such form, or
    the old value is still needed, the new one is copied into the old tensor at the end.

    Args:
        module: a lowered graph.
        outputs: what it returns.
        given: its placeholders of the call's tensors, by name.

    Raises:
        TpCompileError: rows of a pool, which must not be copied, would be.
    """
    graph = module.graph
    end = graph.output_node()
    results = list(end.args[0])  # type: ignore[arg-type]
    copied: list[tuple[Node, Node]] = []
    for i, spec in enumerate(outputs):
        old, new = given.get(spec.name), results[i]
        if is_pooled(spec.name):
            if new is not old and (old is None or not _write(graph, old, new)):
                raise TpCompileError(
                    "what a layer writes into a paged cache cannot be written where this rank has its rows",
                    where=spec.name,
                    todo="use generate with a batch of prompts",
                )
            results[i] = old
            continue
        if not spec.in_place or old is None or new is old or not _alike(old, new):
            continue
        if not _write(graph, old, new):
            copied.append((old, new))
        results[i] = old
    with graph.inserting_before(end):
        # One state may become what another was (or a view of it), which is written to as well.
        new_values = [_call(graph, aten.clone.default, (n,), {}, n) if _is_view(n) else n for _, n in copied]
        for (old, _), new in zip(copied, new_values, strict=True):
            _call(graph, aten.copy_.default, (old, new), {}, old)
    end.args = (tuple(results),)
    graph.lint()
    module.recompile()


def _alike(old: Node, new: Node) -> bool:
    a, b = old.meta["val"], new.meta["val"]
    return bool(a.shape == b.shape and a.dtype == b.dtype)


def _write(graph: Graph, old: Node, new: Node) -> bool:
    """Turns the call that makes the new value into one that writes, if nobody would notice."""
    target = _writing_form(new)
    if target is None or new.args[0] is not old or _needed_later(old, new):
        return False
    with graph.inserting_before(new):
        written = _call(graph, target, new.args, new.kwargs, new)
    new.replace_all_uses_with(written)
    graph.erase_node(new)
    return True


def _writing_form(node: Node) -> OpOverload | None:
    if not isinstance(node.target, OpOverload) or node.target.namespace != "aten":
        return None
    packet = getattr(aten, f"{node.target.overloadpacket.__name__}_", None)
    found = getattr(packet, node.target._overloadname, None)
    return found if isinstance(found, OpOverload) else None


def _needed_later(old: Node, new: Node) -> bool:
    """Whether the old value is read after the new one is made, directly or through a view of it."""
    return any(user > new or _is_view(user) for user in old.users if user is not new)


def _is_view(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)  # an input has none
    return schema is None or any(r.alias_info is not None for r in schema.returns)


def _call(graph: Graph, target: object, args: object, kwargs: object, like: Node) -> Node:
    node = graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
    node.meta.update(like.meta)
    return node

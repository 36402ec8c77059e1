"""MergeMatmuls: matmuls of one input with segments of one weight become one matmul."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from tpcompile.ir.graph_edit import call
from tpcompile.ir.markers import COMMUNICATING, matmul_merged, part_of
from tpcompile.ir.nodes import tensor_of
from tpcompile.ir.sizes import bytes_of
from tpcompile.planner.global_program import GlobalProgram, Pass
from tpcompile.planner.search.cost import PRESETS, CostModel

aten = torch.ops.aten
# Where the input, the weight and the bias stand, and the dimension of the weight that the result keeps.
_MATMULS: dict[Any, tuple[int, int, int | None, int]] = {
    aten.linear.default: (0, 1, 2, 0),
    aten.addmm.default: (1, 2, 0, 1),
    aten.mm.default: (0, 1, None, 1),
    aten.matmul.default: (0, 1, None, 1),
}


@dataclass(frozen=True)
class MergeMatmuls(Pass):
    """Replaces ``op(x, W0)``, ``op(x, W1)``, ... by one ``op(x, [W0 W1 ...])`` where these are together.

    They do where they are segments of one parameter, as ``split-packed-matmul`` cut it: on every rank the
    local segments stand one behind the other in one tensor, so that one matmul on it gives all results, each
    a view of the joint one. Weights of several parameters are left alone: joining those would be a copy in
    every call, or storage that they share behind the user's back. Fires where the cost model says that it
    pays: a call less, and the input read once, against results that have to be copied to be sent.
    """

    name = "merge-matmuls"
    cost: CostModel = PRESETS["cpu"]

    def apply(self, program: GlobalProgram) -> bool:
        found = [run for run in _runs(program) if self._pays(run)]
        at = {node: i for i, node in enumerate(program.graph.nodes)} if found else {}
        for run in found:
            _merge(run, before=min(run, key=at.__getitem__))
        return bool(found)

    def _pays(self, run: list[Node]) -> bool:
        x = run[0].args[_MATMULS[run[0].target][0]]
        assert isinstance(x, Node)
        saved = (len(run) - 1) * (self.cost.launch + self.cost.touch(bytes_of(tensor_of(x))))
        sent = [n for n in run if any(u.target in COMMUNICATING for u in n.users)]
        return saved > sum(2 * self.cost.touch(bytes_of(tensor_of(n))) for n in sent)


def _runs(program: GlobalProgram) -> Iterator[list[Node]]:
    """Matmuls of the same input with segments that follow each other in one parameter."""
    groups: dict[Any, list[Node]] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and (key := _key(program, node)) is not None:
            groups.setdefault(key, []).append(node)
    for nodes in groups.values():
        nodes.sort(key=lambda n: _order(program, n))
        for _, numbered in itertools.groupby(
            enumerate(nodes), lambda pair: _order(program, pair[1]) - pair[0]
        ):
            run = [node for _, node in numbered]
            if len(run) > 1:
                yield run


def _key(program: GlobalProgram, node: Node) -> Any:
    """What matmuls must have in common to be merged; None for what cannot be."""
    if node.target not in _MATMULS or node.kwargs:
        return None
    x, weight, bias, kept = _MATMULS[node.target]
    held = program.sources.get(node.args[weight])  # type: ignore[arg-type]
    if held is None or held.order < 0 or program.packed_dims[held.spec.name] != kept:
        return None
    if node.args[weight].meta["val"].ndim != 2:  # type: ignore[union-attr]
        return None
    name = None
    if bias is not None and len(node.args) > bias:
        added = program.sources.get(node.args[bias])  # type: ignore[arg-type]
        if added is None or added.order != held.order or node.args[bias].meta["val"].ndim != 1:  # type: ignore[union-attr]
            return None
        name = added.spec.name
    return node.target, node.args[x], held.spec.name, name


def _order(program: GlobalProgram, node: Node) -> int:
    return program.sources[node.args[_MATMULS[node.target][1]]].order  # type: ignore[index]


def _merge(run: list[Node], before: Node) -> None:
    """Puts one call before the first of several, which become its parts."""
    graph, target = run[0].graph, run[0].target
    x = _MATMULS[target][0]
    args = [run[0].args[i] if i == x else [n.args[i] for n in run] for i in range(len(run[0].args))]
    with graph.inserting_before(before):
        merged = call(graph, matmul_merged, (target, *args), like=run[0])
    for i, node in enumerate(run):
        # The same nodes, so that what is known of them (factors, placement) stays known.
        node.target, node.args = part_of, (merged, i)
        node.meta.pop("choices", None)

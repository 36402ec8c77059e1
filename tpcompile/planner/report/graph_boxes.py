"""A rewritten program, or a layer of it, as boxes: matmuls, collectives, weights, and what is between."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from tpcompile.ir import markers
from tpcompile.ir.names import starred
from tpcompile.ir.nodes import is_tensor, module_path
from tpcompile.ir.print_graph import target_text
from tpcompile.planner.global_program import GlobalProgram
from tpcompile.rules.rule import Rule

_MOST_WORDS = 3


@dataclass(eq=False)
class Box:
    """Something to draw.

    Attributes:
        kind: ``matmul``, ``collective`` (what sends), ``marker`` (what changes a placement and sends nothing,
            or in backward only), ``other``, ``given`` or ``result``.
        label: its name.
        text: what it does.
        nodes: the calls in it.
    """

    kind: str
    label: str
    text: str = ""
    nodes: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class Boxes:
    """A drawing to be made: its name, boxes in the order of the program, edges with placements."""

    name: str
    boxes: tuple[Box, ...]
    edges: Mapping[tuple[Box, Box], tuple[str, ...]]


def boxes_of(program: GlobalProgram, name: str, nodes: Collection[Node]) -> Boxes:
    """Some calls of a rewritten program as boxes.

    Calls that are neither matmuls nor changes of placement, and that are connected without one between them,
    are one box. So boxes form no circle: along every edge the number of matmuls and changes before it grows.
    """
    calls, prefix = [n for n in nodes if n.users], starred(name)
    inside, alone = set(calls), {n: kind for n in calls if (kind := _kind(program, n))}
    level: dict[Node, int] = {}
    for node in calls:
        before = [level[i] + (i in alone) for i in node.all_input_nodes if i in inside]
        level[node] = max(before, default=0)
    box: dict[Node, Box] = {}
    for node in calls:
        if node in alone:
            box[node] = Box(alone[node], _label(prefix, node), _operator(node), [node])
        else:
            near = [
                i for i in node.all_input_nodes if i in box and i not in alone and level[i] == level[node]
            ]
            box[node] = box[near[0]] if near else Box("other", "")
            box[node].nodes.append(node)
            for other in near[1:]:
                _merge(box, box[other], box[node])
    for each in dict.fromkeys(box.values()):
        if each.kind == "other":
            each.label, each.text = _described(prefix, each.nodes)
    return _with_ends(program, name, calls, box)


def _kind(program: GlobalProgram, node: Node) -> str:
    if node.target in markers.COMMUNICATING:
        return "collective"
    if node.target in markers.MARKERS:
        return "marker"
    if node.target in markers.MERGED:
        return "matmul" if node.target is markers.matmul_merged else ""
    rule = program.planned_factors.rules.get(node)
    return "matmul" if isinstance(rule, Rule) and rule.contraction else ""


def _merge(box: dict[Node, Box], one: Box, into: Box) -> None:
    if one is not into:
        into.nodes += one.nodes
        box.update(dict.fromkeys(one.nodes, into))


def _operator(node: Node) -> str:
    if node.target is markers.matmul_merged:
        return f"{len(node.users)} matmuls merged"
    return target_text(node).removeprefix("aten.")


def _label(name: str, node: Node) -> str:
    path = starred(module_path(node)).removeprefix(name).removeprefix(".")
    return path or (name.rpartition(".")[0] or name)


def _described(name: str, nodes: list[Node]) -> tuple[str, str]:
    """The modules of some calls, and their operators."""
    modules = list(dict.fromkeys(starred(module_path(n)).removeprefix(name).strip(".") for n in nodes))
    words = list(dict.fromkeys(target_text(n).removeprefix("aten.").split(".")[0] for n in nodes))
    more = f" … {len(nodes)} calls" if len(words) > _MOST_WORDS else ""
    named = [m for m in modules if m]
    return ", ".join(named[:2]) + (" …" if len(named) > 2 else ""), ", ".join(words[:_MOST_WORDS]) + more


def _with_ends(program: GlobalProgram, name: str, calls: list[Node], box: dict[Node, Box]) -> Boxes:
    """Adds what comes from elsewhere and what goes there, and the edges; weights are named in their boxes."""
    names, ends = program.params(), dict[Node, Box]()
    edges: dict[tuple[Box, Box], dict[str, None]] = {}
    held: dict[Box, dict[str, None]] = {}
    for node in calls:
        for source in node.all_input_nodes:
            if source in names:
                held.setdefault(box[node], {})[f"{names[source].rpartition('.')[2]} {_placement(source)}"] = (
                    None
                )
                continue
            if source not in box and is_tensor(source):
                ends.setdefault(source, Box("given", _origin(program, source), "", [source]))
            start = box.get(source) or ends.get(source)
            if start is not None and start is not box[node]:
                placement = _placement(source if is_tensor(source) else node)
                edges.setdefault((start, box[node]), {})[placement] = None
        if is_tensor(node) and any(user not in box for user in node.users):
            result = ends.setdefault(node, Box("result", "result", "", [node]))
            edges.setdefault((box[node], result), {})[_placement(node)] = None
    for each, weights in held.items():
        if each.kind != "other":
            each.text += f": {', '.join(weights)}"
    boxes = (*ends.values(), *box.values())
    return Boxes(name, tuple(dict.fromkeys(boxes)), {pair: tuple(each) for pair, each in edges.items()})


def _origin(program: GlobalProgram, source: Node) -> str:
    given = program.sources.get(source)
    where = given.spec.name if given is not None else starred(module_path(source)) or target_text(source)
    return f"from {where}"


def _placement(value: Node) -> str:
    return " x ".join(map(str, value.meta.get("placement", ()))) or "R"

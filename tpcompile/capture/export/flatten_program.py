"""Turns a decomposed ExportedProgram into a flat graph with tpcompile's own input and output lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.export.graph_signature import OutputKind as Export
from torch.fx import Graph, GraphModule, Node

from tpcompile.capture.caches.call_results import GivenCache
from tpcompile.errors import CannotCapture, TpCompileError
from tpcompile.ir.module_tensors import first_names, persistent_names
from tpcompile.ir.torch_internals import FakeTensor

from .read_guards import to_python
from .specs import InputSpec, OutputKind, OutputSpec
from .value_checks import take_checks

PREFIX = "model"
"""The attribute under which the captured wrapper holds the model; stripped from every name."""

_KINDS = {
    InputKind.PARAMETER: "param",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.USER_INPUT: "user",
}


@dataclass(frozen=True)
class UserResult:
    """One leaf of what a call leaves behind: a tensor of the graph, or a python value that was baked in."""

    name: str
    is_traced: bool
    value: Any = None
    kind: OutputKind = "user"


def strip_prefix(name: str) -> str:
    """Return a name as the model knows it."""
    return name[len(PREFIX) + 1 :] if name.startswith(PREFIX + ".") else ("" if name == PREFIX else name)


def merge_names(program: ExportedProgram, model: nn.Module) -> None:
    """A tensor under several names is given once: torch traces no writes into one that is given twice."""
    canonical, graph = first_names(model), program.graph
    nodes = {node.name: node for node in graph.find_nodes(op="placeholder")}
    given: dict[str, Node] = {}
    for spec in list(program.graph_signature.input_specs):
        if _KINDS.get(spec.kind) not in ("param", "buffer"):
            continue
        name, node = strip_prefix(str(spec.target)), nodes[spec.arg.name]
        first = given.setdefault(canonical.get(name, name), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            program.graph_signature.input_specs.remove(spec)


def flatten_program(
    program: ExportedProgram,
    model: nn.Module,
    leaf_names: Sequence[str],
    leaves: Sequence[Any],
    results: Sequence[UserResult],
    peeked: Mapping[int, torch.Tensor],
) -> tuple[GraphModule, list[InputSpec], list[OutputSpec], dict[str, torch.Tensor]]:
    """Return the graph with placeholders and outputs in ``Captured``'s order, their specs, and constants."""
    graph = program.graph_module.graph
    keyed = _keyed_placeholders(program, model, leaf_names, leaves)
    for node in graph.nodes:
        _rename_stack(node)
    checks = take_checks(graph)
    inputs = _order_placeholders(graph, keyed, model, leaf_names, leaves)
    outputs = _order_outputs(graph, program, model, results, checks, _traced(leaf_names, leaves))
    # Placeholders stay even when unused: they are the calling convention.
    graph.eliminate_dead_code()
    gm = GraphModule(program.graph_module, graph, class_name="Captured")
    constants = {
        spec.name: _constant(program, spec.name, node)
        for spec, node in zip(inputs, graph.find_nodes(op="placeholder"), strict=True)
        if spec.kind == "constant"
    }
    inputs = [_attribute(spec, model, constants, peeked) for spec in inputs]
    return gm, inputs, outputs, constants


def _keyed_placeholders(
    program: ExportedProgram, model: nn.Module, leaf_names: Sequence[str], leaves: Sequence[Any]
) -> dict[tuple[str, str], Node]:
    """Return (kind, name) -> placeholder."""
    canonical = first_names(model)
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    users = iter(_traced(leaf_names, leaves))
    keyed: dict[tuple[str, str], Node] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind not in _KINDS:
            effects = [n for n in program.graph.nodes if "with_effects" in str(n.target)]
            found = ", ".join(dict.fromkeys(str(n.args[1]) for n in effects)) or spec.kind.name
            raise CannotCapture(
                f"the program does something besides computing: {found}",
                where=str(effects[0].meta.get("stack_trace", "")).strip() if effects else "forward",
                todo="leave it out of forward",
            )
        kind = _KINDS[spec.kind]
        node = nodes[spec.arg.name]
        name = next(users) if kind == "user" else strip_prefix(str(spec.target))
        name = canonical.get(name, name) if kind in ("param", "buffer") else name
        keyed[kind, name] = node
    return keyed


def _traced(leaf_names: Sequence[str], leaves: Sequence[Any]) -> list[str]:
    return [name for name, leaf in zip(leaf_names, leaves, strict=True) if isinstance(leaf, torch.Tensor)]


def _order_placeholders(
    graph: Graph,
    keyed: Mapping[tuple[str, str], Node],
    model: nn.Module,
    leaf_names: Sequence[str],
    leaves: Sequence[Any],
) -> list[InputSpec]:
    order = [("param", name) for name, _ in model.named_parameters()]
    order += [("buffer", name) for name, _ in model.named_buffers()]
    order += [key for key in keyed if key[0] == "constant"]
    missing = [name for kind, name in keyed if kind in ("param", "buffer") and (kind, name) not in set(order)]
    if missing:
        raise TpCompileError(
            f"the captured program uses tensors that the model does not name: {missing[:3]}",
            where="forward",
            todo="tensor subclasses as parameters (quantised weights, DTensor) are not supported",
        )
    saved = set(persistent_names(model))
    inputs = [InputSpec(kind, name, saved=kind != "buffer" or name in saved) for kind, name in order]  # type: ignore[arg-type]
    nodes = [keyed[key] for key in order]
    body = next((n for n in graph.nodes if n.op != "placeholder"), graph.output_node())
    for name, leaf in zip(leaf_names, leaves, strict=True):
        node = keyed.get(("user", name))
        if node is None:
            with graph.inserting_before(body):
                node = graph.placeholder(f"constant_argument_{len(nodes)}")
            node.meta["val"] = leaf
            inputs.append(InputSpec("user", name, value=leaf))
        else:
            extents = tuple(_extent(size) for size in node.meta["val"].shape)
            inputs.append(InputSpec("user", name, extents=extents))
        nodes.append(node)
    for node in nodes:
        body.prepend(node)
    return inputs


def _extent(size: int | torch.SymInt) -> int | str:
    expression = size if isinstance(size, int) else size.node.expr
    return int(expression) if isinstance(expression, int) or expression.is_number else to_python(expression)


def _order_outputs(
    graph: Graph,
    program: ExportedProgram,
    model: nn.Module,
    results: Sequence[UserResult],
    checks: Sequence[tuple[OutputSpec, Node]],
    traced_names: Sequence[str],
) -> list[OutputSpec]:
    states = {result.name for result in results if result.kind == "state"}
    written, canonical = set(), first_names(model)
    output = graph.output_node()
    user: list[Any] = []
    mutations: list[tuple[OutputSpec, Any]] = []
    for spec, value in zip(program.graph_signature.output_specs, output.args[0], strict=True):  # type: ignore[arg-type]
        if spec.kind is Export.USER_OUTPUT:
            user.append(value)
        elif spec.kind is Export.BUFFER_MUTATION:
            name = strip_prefix(str(spec.target))
            mutations.append((OutputSpec("buffer_mutation", canonical.get(name, name)), value))
        else:
            name = strip_prefix(str(spec.target))
            if spec.kind is Export.USER_INPUT_MUTATION:
                name = traced_names[list(program.graph_signature.user_inputs).index(str(spec.target))]
                if name in states:  # which is a result by itself
                    written.add(name)
                    continue
            raise TpCompileError(
                f"the model's forward changes {name} in place ({spec.kind.name})",
                where="forward",
                todo="clone the tensor before changing it",
            )
    traced = iter(user)
    flat = [
        next(traced) if r.is_traced else None if isinstance(r.value, GivenCache) else r.value for r in results
    ]
    specs = [
        OutputSpec(
            r.kind,
            r.name,
            None if r.is_traced else r.value,
            in_place=r.kind == "state" and r.name in written,
        )
        for r in results
    ]
    behind = [*checks, *mutations]
    output.args = ((*flat, *(value for _, value in behind)),)
    output.meta["val"] = tuple(v.meta.get("val") if isinstance(v, Node) else v for v in output.args[0])
    return [*specs, *(spec for spec, _ in behind)]


def _rename_stack(node: Node) -> None:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return
    kept = {}
    for key, (name, kind) in stack.items():
        if name == PREFIX or name.startswith(PREFIX + "."):
            kept[key.replace(f"L__self___{PREFIX}", "L__self__")] = (strip_prefix(name), kind)
    if kept:
        node.meta["nn_module_stack"] = kept
    else:
        del node.meta["nn_module_stack"]


def _constant(program: ExportedProgram, name: str, node: Node) -> torch.Tensor:
    """The value of a tensor that is neither a parameter, nor a buffer, nor given.

    Raises:
        CannotCapture: it has none, or not that of the tensor that the model's python sees.
    """
    value = program.constants.get(f"{PREFIX}.{name}", program.constants.get(name))
    if not isinstance(value, torch.Tensor) or value.device.type == "meta" or isinstance(value, FakeTensor):
        raise CannotCapture(
            f"the tensor {name} is baked into the program, but it has no value",
            where=str(node.meta.get("stack_trace", "")).strip(),
            todo="register it as a buffer, or capture the model with real weights",
        )
    return value


def _attribute(
    spec: InputSpec,
    model: nn.Module,
    constants: Mapping[str, torch.Tensor],
    peeked: Mapping[int, torch.Tensor],
) -> InputSpec:
    """The spec of a constant; that of an attribute of a module, if no other attribute is the same tensor.

    What python has looked into (``item``) has left its value in the graph: it is a constant.
    """
    value = constants.get(spec.name)
    if value is None or id(value) in peeked:
        return spec
    path, _, name = spec.name.rpartition(".")
    holders = [m for m in model.modules() for held in m.__dict__.values() if held is value]
    alone = len(holders) == 1 and vars(model.get_submodule(path)).get(name) is value
    return replace(spec, kind="attribute") if alone else spec

"""Makes exported programs without the composite operators that no rule knows, and without writes in place."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, OutputSpec, TensorArgument
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import extract_val
from torch.fx.node import map_arg

from tpcompile.ir.graph_edit import fake_mode, value_of
from tpcompile.ir.torch_internals import FakeTensorMode, Max, Min, OpOverload, is_any_autocast_enabled
from tpcompile.rules.table import has_rule

from .aliases import alias_depends, is_composite, returned_argument
from .drop_writes import drop_writes, without_write
from .take_apart import CannotTakeApart, Sizes, take_apart

# These look at their results and raise an error, which is not an operator of a functional graph.
_CHECKING = (
    *("aten.linalg_inv", "aten.inverse", "aten.linalg_solve", "aten.linalg_cholesky"),
    *("aten.linalg_ldl_factor", "aten.linalg_lu_factor", "aten.linalg_tensorinv", "aten.linalg_tensorsolve"),
    *("aten.linalg_matrix_power", "aten.matrix_power"),
)


def decompose(program: ExportedProgram) -> ExportedProgram:
    """The program in a functional form, of operators that have rules or that cannot be taken apart.

    torch's own way traces the whole program twice more, longer than it took to export. Most programs write
    nothing in place and have few calls to take apart, which is then done one by one.
    """
    # Tracing inside of an autocast region writes its casts into the graph.
    if not is_any_autocast_enabled():
        try:
            _make_functional(program)
            return program
        except CannotTakeApart:
            _name_outputs(program)  # what was done by then is as torch would have it
    return program.run_decompositions(decompositions())


def _name_outputs(program: ExportedProgram) -> None:
    """The program's signature knows its results by the names of their nodes, some of which are others now."""
    results: Any = program.graph.output_node().args[0]
    for spec, result in zip(program.graph_signature.output_specs, results, strict=True):
        if isinstance(result, Node):
            spec.arg.name = result.name


def _declare_writes(program: ExportedProgram, final: Mapping[Node, Node]) -> None:
    """What tensors that were given become is a result, as torch has it: buffers first."""
    signature, output = program.graph_signature, program.graph.output_node()
    kinds = {spec.arg.name: (spec.kind, spec.target) for spec in signature.input_specs}
    buffers, arguments = {}, {}
    for placeholder, value in final.items():
        kind, target = kinds[placeholder.name]
        if kind is InputKind.BUFFER:
            buffers[value] = OutputSpec(OutputKind.BUFFER_MUTATION, TensorArgument(value.name), target)
        else:
            spec = OutputSpec(OutputKind.USER_INPUT_MUTATION, TensorArgument(value.name), placeholder.name)
            arguments[value] = spec
    first = {**buffers, **arguments}
    signature.output_specs[:0] = first.values()
    output.args = ((*first, *output.args[0]),)


def _make_functional(program: ExportedProgram) -> None:
    graph = program.graph
    mode = fake_mode(graph)
    for node in list(graph.nodes):
        if _casts_nothing(node) or _is_written_whole(node):  # its result is its input, which may be written
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    changeable = {
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind in (InputKind.BUFFER, InputKind.USER_INPUT)
    }
    given = {node for node in graph.find_nodes(op="placeholder") if node.name in changeable}
    _declare_writes(program, drop_writes(graph, mode, given))
    torchs = decompositions()
    for node in graph.nodes:
        if node.op == "get_attr" and node.users:
            raise CannotTakeApart("a region of its own")
        if not _is_tensor_call(node):
            continue
        if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
            raise CannotTakeApart(f"{node.target} writes")
        if node.target in torchs and not alias_depends(node.target) and node.target.namespace == "aten":
            raise CannotTakeApart(f"{node.target} is made of operators with rules, maybe")
    _take_apart_all(graph, mode, torchs)


def _casts_nothing(node: Node) -> bool:
    """Whether a call is a ``to`` that finds its input as it should be."""
    if not isinstance(node.target, OpOverload) or node.target.overloadpacket is not torch.ops.aten.to:
        return False
    return returned_argument(node) is not None


def _is_written_whole(node: Node) -> bool:
    """Whether a call is the ``:`` of something like ``x[:, index] = y``: a slice of all there is."""
    if node.target is not torch.ops.aten.slice.Tensor or node.kwargs or node.args[2:] != (0, sys.maxsize):
        return False
    return any(_is_written_whole(u) or (u.args[0] is node and without_write(u.target)) for u in node.users)


def _is_tensor_call(node: Node) -> bool:
    """Not one that computes sizes, or takes one of several results."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    return isinstance(node.meta.get("val"), Tensor | list | tuple | None)


def _take_apart_all(graph: Graph, mode: FakeTensorMode, without_rules: Mapping[OpOverload, Any]) -> None:
    sizes = Sizes()
    for node in graph.nodes:  # which goes on behind a node that is erased
        composite = _is_tensor_call(node) and is_composite(node.target)
        if composite and (alias_depends(node.target) or node.target in without_rules):
            take_apart(node, sizes, mode)
            continue
        if node.target is torch.ops.aten.lift_fresh_copy.default:
            node.target = torch.ops.aten.clone.default  # as functionalisation has it
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            _settle_strides(node, mode)
        elif node.op != "call_function" or not _fold_size(node):
            sizes.note(node)


def _fold_size(node: Node) -> bool:
    """Writes a size that turned out to be fixed as a number; the call is left without users."""
    val = node.meta.get("val")
    if isinstance(val, torch.SymInt) and val.node.expr.is_number:
        val = int(val.node.expr)
    if type(val) is not int:
        return False
    for user in list(node.users):
        user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda n: val if n is node else n)
    return True


def _settle_strides(node: Node, mode: FakeTensorMode) -> None:
    """Export may have computed strides before it knew which sizes are equal: `Min(96, 96 * s)` for 96."""
    strides = [s.node.expr for s in node.meta["val"].stride() if isinstance(s, torch.SymInt)]
    if any(expr.has(Min, Max) for expr in strides):
        node.meta["val"] = extract_val(value_of(node.target, node.args, node.kwargs, mode))  # type: ignore[arg-type]


@functools.cache
def _composites() -> dict[OpOverload, Callable[..., Any]]:
    """Every operator that torch composes of others, with how it does so."""
    return {op: how for op, how in torch.export.default_decompositions().items() if is_composite(op)}


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Composite operators without a rule, for ``ExportedProgram.run_decompositions``.

    ``multiply`` becomes ``mul``, ``fft_fftn`` becomes ``_fft_c2c``; ``linear`` and attention, which have
    rules, stay. A rule that a user registers keeps its operator.
    """
    return {
        op: how for op, how in _composites().items() if not has_rule(op) and not str(op).startswith(_CHECKING)
    }

"""A copy of a program's graph that Inductor may change as it likes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node

from tpcompile.ir.graph_edit import copied
from tpcompile.ir.torch_internals import invoke_subgraph, tag_activation_checkpoint
from tpcompile.lowering.recompute import body_of


def own_graph(module: GraphModule, fixed: Sequence[bool], kept: Sequence[bool]) -> GraphModule:
    """A program without the values of its capture; calls of submodules are regions that are compiled once.

    Args:
        module: a rank's graph.
        fixed: which placeholders stay where they are in memory, so that a CUDA graph need not copy them.
        kept: which placeholders it has; the others are not read.
    """
    graph, root = _bare(module.graph), nn.Module()
    calls = graph.find_nodes(op="call_module")
    names = {call.target for call in calls}
    for name, child in module.named_children():
        if name in names:  # not as it is: dynamo is told of it otherwise
            assert isinstance(child, GraphModule)
            child = GraphModule(child, _bare(child.graph), "Layer")
        setattr(root, name, child)
    for call in calls:
        _make_region(graph, call)
    for call in list(graph.nodes):
        if (body := body_of(call)) is not None:
            _make_checkpoint(graph, root, call, body)
    for node, stays, keep in zip(graph.find_nodes(op="placeholder"), fixed, kept, strict=True):
        node.meta["tensor_dict"] = {_STATIC: "unguarded"} if stays else {}
        if not keep:
            graph.erase_node(node)
    return GraphModule(root, graph, "CompiledProgram")


def copy_graph(module: GraphModule) -> GraphModule:
    """A copy that a backend may change, with what dynamo would leave there for AOTAutograd to find."""
    from tpcompile.ir.dynamo_internals import ConstantSource

    made = GraphModule(module, copied(module.graph)[0], "CompiledProgram")
    for node in made.graph.find_nodes(op="placeholder"):
        node._dynamo_source = ConstantSource(node.name)
    made.meta["dynamo_compile_id"] = None
    made._param_name_to_source = {}  # type: ignore[assignment]
    return made


_STATIC = "_dynamo_static_input_type"


def _bare(graph: Graph) -> Graph:
    copy, _ = copied(graph)
    for node in copy.nodes:
        node.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    return copy


def _make_checkpoint(graph: Graph, root: nn.Module, call: Node, body: GraphModule) -> None:
    """Has a call computed again in backward, in the form that torch's compiler knows."""
    own = GraphModule(body, _bare(body.graph), "Region")
    own.meta = dict(body.meta)
    setattr(root, call.name, own)
    with graph.inserting_before(call):
        operands = (graph.get_attr(call.name), *call.args)
        checkpoint = graph.call_function(tag_activation_checkpoint, operands, {"use_reentrant": False})
    call.replace_all_uses_with(checkpoint)
    graph.erase_node(call)


def _make_region(graph: Graph, call: Node) -> None:
    name: Any = call.target
    with graph.inserting_before(call):
        region = graph.call_function(invoke_subgraph, (graph.get_attr(name), name, *call.args))
    call.replace_all_uses_with(region)
    graph.erase_node(call)

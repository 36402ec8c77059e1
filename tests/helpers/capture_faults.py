"""Faults in what capture gives: another program than the model's python."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from tests.helpers.faults import Fault
from tests.helpers.odd_faults import NotDoubled
from tpcompile.planner.global_program import GlobalProgram


def _left_out(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
    """A call that leaves shape and type as they are is not there."""
    for node in program.graph.nodes:
        first = next(iter(node.all_input_nodes), None) if node.op == "call_function" else None
        if first is not None and isinstance(val := node.meta.get("val"), torch.Tensor) and node.users:
            other = first.meta.get("val")
            if isinstance(other, torch.Tensor) and other.shape == val.shape and other.dtype == val.dtype:
                yield lambda node=node, first=first: node.replace_all_uses_with(first)


def _stopped(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
    """No gradient flows through a call: as if its backward were lost."""
    for node in program.graph.nodes:
        val = node.meta.get("val")
        if node.op == "call_function" and isinstance(val, torch.Tensor) and val.is_floating_point():
            yield lambda node=node: _detach(node)


def _detach(node: torch.fx.Node) -> None:
    with node.graph.inserting_after(node):
        cut = node.graph.call_function(torch.ops.aten.detach.default, (node,))
    cut.meta.update(node.meta)
    node.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut)


def _not_written(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
    """A buffer that the model writes stays as it was."""
    out, held = program.graph.output_node(), {s.spec.name: n for n, s in program.sources.items()}
    for at, spec in enumerate(program.captured.outputs):
        if spec.kind == "buffer_mutation" and spec.name in held:
            results = list(out.args[0])  # type: ignore[arg-type]
            results[at] = held[spec.name]
            yield lambda results=results: setattr(out, "args", (tuple(results),))


def _inputs_exchanged(program: GlobalProgram) -> Iterator[Callable[[], Any]]:
    """Two inputs of one shape and type, each instead of the other."""
    held = [n for n in program.graph.find_nodes(op="placeholder") if n.users]
    for one, two in itertools.combinations(held, 2):
        a, b = one.meta.get("val"), two.meta.get("val")
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype:
            yield lambda one=one, two=two: _exchange(one, two)


def _exchange(one: Node, two: Node) -> None:
    other = {one: two, two: one}
    for user in dict.fromkeys([*one.users, *two.users]):
        user.args = torch.fx.node.map_arg(user.args, lambda n: other.get(n, n))


CAPTURES: dict[str, Fault] = {
    "capture: a call left out": _left_out,
    "capture: a gradient stops": _stopped,
    "capture: a buffer is not written": _not_written,
    "capture: inputs exchanged": _inputs_exchanged,
}
"""Put into a captured graph."""


def _hooks(model: nn.Module) -> Iterator[Callable[[], Any]]:
    """A module without one of its hooks."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks:
                yield hooks.clear


def _backwards(model: nn.Module) -> Iterator[Callable[[], Any]]:
    """What has a backward of its own goes without."""
    for module in model.modules():
        if hasattr(module, "function"):
            yield lambda module=module: setattr(module, "function", NotDoubled)


def _attributes(model: nn.Module) -> Iterator[Callable[[], Any]]:
    """A number that a module holds is another one."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if type(value) is float and value:
                yield lambda module=module, name=name, value=value: setattr(module, name, 1.5 * value)


MODULES: dict[str, Callable[[nn.Module], Iterator[Callable[[], Any]]]] = {
    "capture: a hook dropped": _hooks,
    "capture: a custom backward dropped": _backwards,
    "capture: another attribute": _attributes,
}
"""Put into the model, while it is captured."""

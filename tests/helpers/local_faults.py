"""Faults beyond rewritten graphs: in one rank's program, in a rank's slices, in rules, and in capture."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from tpcompile.lowering.state import SOURCE
from tpcompile.runtime.verify.inputs import Inputs

aten, ops = torch.ops.aten, torch.ops.tpcompile
Edit = Callable[[], Any]
GraphFault = Callable[[GraphModule], Iterator[Edit]]
"""Gives the edits that put a fault into one rank's program, one for each place."""


def _calls(program: GraphModule, *targets: Any) -> list[Node]:
    return [n for n in program.graph.nodes if n.op == "call_function" and n.target in targets]


def _left_out(*targets: Any) -> GraphFault:
    def fault(program: GraphModule) -> Iterator[Edit]:
        for node in _calls(program, *targets):
            yield lambda node=node: _leave_out(node)

    return fault


def _leave_out(node: Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    node.graph.erase_node(node)


def not_summed_up(program: GraphModule) -> Iterator[Edit]:
    """What the ranks have of a gradient is not added up."""
    yield from _left_out(ops.copy_to_ranks.default)(program)
    for node in _calls(program, ops.copy_all_to_ranks.default):
        weights: Any = node.args[0]
        for copy in node.users:
            weight = weights[copy.args[1]]
            yield lambda copy=copy, weight=weight: copy.replace_all_uses_with(weight)


def retargeted(before: Any, after: Any) -> GraphFault:
    def fault(program: GraphModule) -> Iterator[Edit]:
        for node in _calls(program, before):
            yield lambda node=node: setattr(node, "target", after)

    return fault


def operands_exchanged(program: GraphModule) -> Iterator[Edit]:
    """What is subtracted, divided or multiplied as matrices, the other way round."""
    for node in _calls(program, aten.sub.Tensor, aten.div.Tensor, aten.mm.default, aten.add.Tensor):
        if all(isinstance(a, Node) for a in node.args[:2]):
            yield lambda node=node: setattr(node, "args", (node.args[1], node.args[0], *node.args[2:]))


def constant_changed(program: GraphModule) -> Iterator[Edit]:
    """A number that is given to a call is half as large again."""
    for node in program.graph.nodes:
        for at, arg in enumerate(node.args if node.op == "call_function" else ()):
            if type(arg) is float and arg:
                yield lambda node=node, at=at, arg=arg: node.update_arg(at, 1.5 * arg)


def slice_shifted(program: GraphModule) -> Iterator[Edit]:
    """A slice begins and ends one further on."""
    for node in _calls(program, aten.slice.Tensor):
        if len(node.args) > 3 and all(type(a) is int for a in node.args[2:4]):
            start, end = node.args[2:4]
            yield lambda node=node, start=start, end=end: setattr(
                node, "args", (*node.args[:2], start + 1, end + 1, *node.args[4:])
            )


def weights_exchanged(program: GraphModule) -> Iterator[Edit]:
    """Two weights of one shape, each instead of the other."""
    held = [n for n in program.graph.find_nodes(op="placeholder") if n.meta[SOURCE].spec.kind == "param"]
    for one, two in itertools.pairwise(held):
        if one.meta["val"].shape == two.meta["val"].shape and one.users and two.users:
            yield lambda one=one, two=two: _exchange(one, two)


def _exchange(one: Node, two: Node) -> None:
    one.meta[SOURCE], two.meta[SOURCE] = two.meta[SOURCE], one.meta[SOURCE]


def not_scaled(program: GraphModule) -> Iterator[Edit]:
    """A value is used as it is, not multiplied by a number."""
    for node in _calls(program, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar):
        if not isinstance(node.args[1], Node):
            yield lambda node=node: node.replace_all_uses_with(node.args[0])


def dims_exchanged(program: GraphModule) -> Iterator[Edit]:
    """A view of other sizes: two that stand beside each other, exchanged."""
    for node in _calls(program, aten.reshape.default, aten.view.default):
        sizes = node.args[1]
        for at in range(len(sizes) - 1):
            if type(sizes[at]) is int and type(sizes[at + 1]) is int and sizes[at] != sizes[at + 1]:
                new = [*sizes[:at], sizes[at + 1], sizes[at], *sizes[at + 2 :]]
                yield lambda node=node, new=new: node.update_arg(1, new)


def collective_of_other_sizes(program: GraphModule) -> Iterator[Edit]:
    """What is gathered or scattered is cut otherwise."""
    for node in _calls(program, ops.all_gather.default, ops.reduce_scatter.default, ops.take_shard.default):
        for at, arg in enumerate(node.args):
            if isinstance(arg, list | tuple) and len(set(arg)) == 1 and arg[0] > 1:
                new = [arg[0] + 1, arg[1] - 1, *arg[2:]]
                yield lambda node=node, at=at, new=new: node.update_arg(at, new)


ONE_RANK: dict[str, GraphFault] = {
    "collective left out": _left_out(ops.all_reduce.default, ops.all_gather.default),
    "collective of other sizes": collective_of_other_sizes,
    "gradients not summed up": not_summed_up,
    "another activation": retargeted(aten.relu.default, aten.silu.default),
    "another activation (silu)": retargeted(aten.silu.default, aten.relu.default),
    "added, not subtracted": retargeted(aten.add.Tensor, aten.sub.Tensor),
    "operands exchanged": operands_exchanged,
    "constant changed": constant_changed,
    "slice shifted": slice_shifted,
    "weights exchanged": weights_exchanged,
    "not scaled": not_scaled,
    "dimensions exchanged": dims_exchanged,
}

SliceFault = Callable[[Inputs, str, Tensor], Tensor]
"""Makes another part of a rank's part of a weight."""


def _rolled(by: Callable[[Inputs, str, int], int]) -> SliceFault:
    """The part is shifted in the dimension that is divided."""

    def fault(inputs: Inputs, name: str, part: Tensor) -> Tensor:
        whole = inputs.layout.params[name].shape
        dims = [d for d, (w, p) in enumerate(zip(whole, part.shape, strict=True)) if w != p and p]
        return part.roll(by(inputs, name, part.shape[dims[0]]), dims[0]) if dims else part

    return fault


def _of_another_rank(inputs: Inputs, name: str, part: Tensor) -> Tensor:
    other = inputs.layout.shard(name, inputs.tensors[name].detach(), (inputs.rank + 1) % inputs.layout.ranks)
    return other if other.shape == part.shape else part


def _segments_swapped(inputs: Inputs, name: str, part: Tensor) -> Tensor:
    layout = inputs.layout
    segments = layout.segments_of(name, part, inputs.rank)
    return torch.cat(list(segments)[::-1], layout.params[name].packed_dim) if len(segments) > 1 else part


def _head(inputs: Inputs, name: str, size: int) -> int:
    """What is never cut in two where the part is divided: a head, an expert."""
    atoms = [a for s in inputs.layout.params[name].segments for dim in s.atoms for a in dim[1:]]
    return atoms[0] if atoms and size > atoms[0] else 1


def _of_another_unit(inputs: Inputs, name: str, part: Tensor) -> Tensor:
    """The first head, or expert, of a part is one that another rank holds."""
    layout, whole = inputs.layout, inputs.tensors[name].detach()
    dims = [d for d, (w, p) in enumerate(zip(whole.shape, part.shape, strict=True)) if w != p and p]
    for rank in range(layout.ranks) if dims else ():
        other = layout.shard(name, whole, rank)
        if other.shape == part.shape and not torch.equal(other, part):
            size = _head(inputs, name, part.shape[dims[0]])
            theirs = other.narrow(dims[0], 0, size)
            return torch.cat([theirs, part.narrow(dims[0], size, part.shape[dims[0]] - size)], dims[0])
    return part


def _of_another_group(inputs: Inputs, name: str, part: Tensor) -> Tensor:
    """Of what several ranks hold alike, such as a key head, what other ranks hold."""
    layout, whole = inputs.layout, inputs.tensors[name].detach()
    others = [layout.shard(name, whole, r) for r in range(layout.ranks) if r != inputs.rank]
    alike = [o for o in others if o.shape == part.shape and torch.equal(o, part)]
    apart = [o for o in others if o.shape == part.shape and not torch.equal(o, part)]
    return apart[0] if alike and apart else part


SLICES: dict[str, SliceFault] = {
    "slices: off by one": _rolled(lambda *_: 1),
    "slices: another rank's": _of_another_rank,
    "slices: segments swapped": _segments_swapped,
    "slices: heads or experts in another order": _rolled(_head),
    "slices: a head or rows of another expert": _of_another_unit,
    "slices: kv head of another group": _of_another_group,
    "slices: transposed": lambda inputs, name, part: (
        part.mT if part.ndim == 2 and part.shape[0] == part.shape[1] else part
    ),
    "slices: a row is zero": lambda inputs, name, part: (
        torch.cat([part[:-1], 0 * part[-1:]]) if part.ndim else part
    ),
    "slices: scaled": lambda inputs, name, part: part * 1.001 if part.is_floating_point() else part,
}

RULES: dict[str, dict[str, str]] = {
    "rule: exp is linear": {"aten.exp": "... -> ...; linear 0", "aten.gelu": "... -> ...; linear 0"},
    "rule: an attention mixes no keys": {
        "aten.scaled_dot_product_attention": "b h q d, b h k d, b h k e -> b h q e",
    },
    "rule: an embedding's rows need no look-up": {"aten.embedding": "v d, ... -> ... d"},
    "rule: positions are free": {"aten.cumsum": "... -> ...", "aten.cumprod": "... -> ..."},
    "rule: a difference is a product": {"aten.sub": "..., ... -> ...; linear 0|1"},
    "rule: a softmax's rows are free": {"aten._softmax": "... d -> ... d", "aten.softmax": "... d -> ... d"},
    "rule: a norm's rows are free": {"aten.layer_norm": "... d, d?, d? -> ... d"},
    "rule: relu is linear": {"aten.relu": "... -> ...; linear 0"},
    "rule: silu is linear": {"aten.silu": "... -> ...; linear 0"},
    "rule: a bias counts on every rank": {
        "aten.linear": "... k, n k, n? -> ... n; linear 0|1; contraction",
    },
    "rule: a product is linear in both": {"aten.mul": "..., ... -> ...; linear 0,1"},
    "rule: a matmul divides other rows": {"aten.linear": "... k, n k, n? -> ... n; once 2; linear 0,1,2"},
}

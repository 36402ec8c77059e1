"""States that are written in place are what the program says, whatever other states become."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph, GraphModule

from tpcompile.capture.caches.paged import KEYS
from tpcompile.capture.export.specs import OutputSpec
from tpcompile.errors import TpCompileError
from tpcompile.ir.graph_edit import call
from tpcompile.ir.torch_internals import FakeTensorMode
from tpcompile.lowering.update_in_place import update_in_place

aten = torch.ops.aten


@pytest.mark.parametrize("shape", [(3,), (3, 3)])
def test_states_become_each_other(shape: tuple[int, ...]) -> None:
    graph, mode = Graph(), FakeTensorMode()
    given = {name: graph.placeholder(name) for name in ("last", "now", "turned")}
    for node in given.values():
        node.meta["val"] = mode.from_tensor(torch.zeros(shape))
    now = given["now"]
    added = call(graph, aten.add.Tensor, (now, 1), like=now)
    order = list(range(len(shape)))[::-1]
    flipped = call(graph, aten.permute.default, (now, order), like=now)
    graph.output((added, now, flipped))
    specs = [OutputSpec("state", name, in_place=True) for name in ("now", "last", "turned")]
    module = GraphModule(torch.nn.Module(), graph)
    update_in_place(module, specs, given)

    before = torch.randn(shape)
    states = [torch.zeros(shape), before.clone(), torch.zeros(shape)]
    module(*states)
    for state, want in zip(states, (before, before + 1, before.permute(order)), strict=True):
        torch.testing.assert_close(state, want)


def test_rows_of_a_pool_are_not_copied() -> None:
    """What is read after it is written would have to be: other layers have rows in the same memory."""
    graph, mode, name = Graph(), FakeTensorMode(), f"cache[0]['{KEYS}']"
    rows = graph.placeholder("rows")
    rows.meta["val"] = mode.from_tensor(torch.zeros(3))
    added = call(graph, aten.add.Tensor, (rows, 1), like=rows)
    later = call(graph, aten.neg.default, (rows,), like=rows)
    graph.output((added, later))
    module = GraphModule(torch.nn.Module(), graph)
    with pytest.raises(TpCompileError, match="cannot be written where this rank has its rows"):
        update_in_place(module, [OutputSpec("state", name, in_place=True)], {name: rows})

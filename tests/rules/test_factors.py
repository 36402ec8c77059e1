"""Factors found by unifying rules over whole graphs, on small graphs written by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from tests.helpers import programs
from tpcompile.ir.nodes import producer
from tpcompile.rules.factors import Factors, Known

GROUPS, REPEATS, HEAD, HIDDEN = 2, 3, 8, 20


def traced(function: Callable[..., object], *shapes: tuple[int, ...]) -> GraphModule:
    """A function of tensors of these shapes, as a graph with fake values."""
    return make_fx(function, tracing_mode="fake")(*(torch.randn(shape) for shape in shapes))


def inputs_of(graph: GraphModule) -> list[Node]:
    return graph.graph.find_nodes(op="placeholder")


def layouts(
    function: Callable[..., object], *shapes: tuple[int, ...]
) -> list[tuple[tuple[object, ...], ...]]:
    """The factors of a traced function's inputs."""
    graph = traced(function, *shapes)
    factors = Factors(graph.graph)
    return [factors.atom_sizes(node) for node in inputs_of(graph)]


class GroupedQueryAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(HIDDEN, GROUPS * REPEATS * HEAD)
        self.k = nn.Linear(HIDDEN, GROUPS * HEAD, bias=False)
        self.v = nn.Linear(HIDDEN, GROUPS * HEAD, bias=False)
        self.o = nn.Linear(GROUPS * REPEATS * HEAD, HIDDEN, bias=False)

    def heads(self, x: Tensor, repeats: int) -> Tensor:
        b, s, _ = x.shape
        x = x.view(b, s, -1, HEAD).transpose(1, 2)
        return x[:, :, None].expand(-1, -1, repeats, -1, -1).reshape(b, -1, s, HEAD)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x), 1), self.heads(self.k(x), REPEATS), self.heads(self.v(x), REPEATS)
        found = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.o(found.transpose(1, 2).reshape(*x.shape[:2], -1))  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=[False, True], ids=["static", "dynamic"])
def attention(request: pytest.FixtureRequest) -> tuple[Factors, dict[str, Node]]:
    program = programs.canonicalised(
        GroupedQueryAttention(), torch.randn(3, 5, HIDDEN), dynamic=request.param
    )
    return program.factors(), {name: node for node, name in program.params().items()}


def test_query_heads_are_groups_and_repeats(attention: tuple[Factors, dict[str, Node]]) -> None:
    factors, params = attention
    assert {name: factors.atom_sizes(node) for name, node in params.items()} == {
        "q.weight": ((GROUPS, REPEATS, HEAD), (HIDDEN,)),
        "q.bias": ((GROUPS, REPEATS, HEAD),),
        "k.weight": ((GROUPS, HEAD), (HIDDEN,)),
        "v.weight": ((GROUPS, HEAD), (HIDDEN,)),
        "o.weight": ((HIDDEN,), (GROUPS, REPEATS, HEAD)),
    }


def test_groups_are_one_class_in_all_weights(attention: tuple[Factors, dict[str, Node]]) -> None:
    factors, params = attention
    groups = {factors.atoms(params[n], 0)[0] for n in ("q.weight", "q.bias", "k.weight", "v.weight")}
    assert groups == {factors.atoms(params["o.weight"], 1)[0]}
    assert factors.atoms(params["q.weight"], 0)[2] == factors.atoms(params["k.weight"], 0)[1]
    assert factors.atoms(params["q.weight"], 1) == factors.atoms(params["k.weight"], 1)


# Values and outputs have different features: the one is summed in q k, the other is kept.
def test_value_features_are_those_of_the_output(attention: tuple[Factors, dict[str, Node]]) -> None:
    factors, params = attention
    values, out, keys = (
        factors.atoms(params["v.weight"], 0)[1],
        factors.atoms(params["o.weight"], 1)[2],
        factors.atoms(params["k.weight"], 0)[1],
    )
    assert values == out != keys


def test_a_split_reaches_what_was_seen_before() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return (torch.mm(x, w) + b).view(4, 5, 6)

    assert layouts(function, (4, 7), (7, 30), (30,)) == [((4,), (7,)), ((7,), (5, 6)), ((5, 6),)]


def test_splits_meet() -> None:
    """Two uses split one dimension differently; both cuts hold."""

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view(2, 12), x.view(8, 3)

    assert layouts(function, (24,)) == [((2, 4, 3),)]


def test_splits_that_do_not_meet_stay_whole() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view(4, 15), x.view(6, 10)

    graph = traced(function, (60,))
    factors = Factors(graph.graph)
    first, second = (n for n in graph.graph.nodes if n.op == "call_function")
    assert [f.size for f in factors.op_factors(first)] == [4, 15]
    assert not factors.op_factors(second)


def test_equal_parts_and_their_uses() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        gate, up = torch.mm(x, w).chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up

    assert layouts(function, (4, 7), (7, 24)) == [((4,), (7,)), ((7,), (2, 12))]


def test_sizes_of_one_have_no_factor() -> None:
    assert layouts(lambda x: x + 1, (4, 1, 6)) == [((4,), (), (6,))]


def test_known_factors_of_placeholders() -> None:
    graph = traced(lambda x: x + 1, (24,))
    (x,) = inputs_of(graph)
    assert Factors(graph.graph, {x: Known([[4, 6]])}).atom_sizes(x) == ((4, 6),)


def test_what_is_divided_is_not_split_across_ranks() -> None:
    graph = traced(lambda x: x.view(6, 4), (24,))
    (x,) = inputs_of(graph)
    (view,) = (n for n in graph.graph.nodes if n.op == "call_function")
    for ranks, sizes, ways in ((2, ((6, 4),), 2), (3, ((6, 4),), 2), (4, ((24,),), 0), (5, ((24,),), 0)):
        factors = Factors(graph.graph, {x: Known([[24]], [((0, 0), ranks)])})
        assert factors.atom_sizes(x) == sizes
        assert len(factors.op_factors(view)) == ways


def test_factors_of_a_matmul() -> None:
    graph = traced(lambda x, w: torch.mm(x, w), (4, 6), (6, 10))
    node = next(n for n in graph.graph.nodes if n.op == "call_function")
    found = Factors(graph.graph).op_factors(node)
    assert [(f.size, f.inputs, f.outputs, f.reduce) for f in found] == [
        (4, ((0, 0), None), ((0, 0),), ""),
        (6, ((1, 0), (0, 0)), (None,), "sum"),
        (10, (None, (1, 0)), ((1, 0),), ""),
    ]


def test_results_are_counted_without_what_is_no_tensor() -> None:
    graph = traced(lambda x: torch.ops.aten.topk(x, 3), (4, 6))
    items = [n for n in graph.graph.nodes if n.op == "call_function" and producer(n)[0] is not n]
    assert [producer(n)[1] for n in items] == [0, 1]
    factors = Factors(graph.graph)
    assert [factors.atom_sizes(n) for n in items] == [((4,), (3,)), ((4,), (3,))]
    assert factors.atoms(items[0], 0) == factors.atoms(items[1], 0) == factors.atoms(inputs_of(graph)[0], 0)

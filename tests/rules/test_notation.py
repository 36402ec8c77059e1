"""Rules as lines of text, rules of users, look-up in the table, and random operators."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import programs
from tests.helpers.check_rule import signed
from tpcompile.errors import TpCompileError
from tpcompile.ir.placements import Shard
from tpcompile.pipeline import rewrite
from tpcompile.rules import table
from tpcompile.rules.notation import instantiate, parse_row
from tpcompile.rules.randomness import random_nodes
from tpcompile.rules.rule import Rule
from tpcompile.rules.table import register_rule
from tpcompile.runtime.verify.rule_program import Case, RuleProgram
from tpcompile.runtime.verify.run_rule import compare

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def _no_rules_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_USER", {})


# Lines.


@pytest.mark.parametrize(
    ("text", "inputs", "outputs", "expected"),
    [
        ("i k, k n -> i n", [(4, 6), (6, 10)], [(4, 10)], "i k, k n -> i n  reduce k:sum"),
        ("... k, n k, n? -> ... n", [(6,), (10, 6)], [(10,)], "k, n k -> n  reduce k:sum"),
        (
            "... k, n k, n? -> ... n",
            [(2, 3, 6), (10, 6), (10,)],
            [(2, 3, 10)],
            "...2 ...1 k, n k, n -> ...2 ...1 n  reduce k:sum",
        ),
        ("... a, ... -> ...", [(4, 5, 6), (5,)], [(4, 5)], "...2 ...1 a, ...1 -> ...2 ...1  reduce a:sum"),
        ("a b -> a b; whole b", [(4, 6)], [(4, 6)], "a b -> a b  whole b"),
        ("a b -> a; reduce b:max", [(4, 6)], [(4,)], "a b -> a  reduce b:max"),
        ("a b -> a; whole b", [(4, 6)], [(4,)], "a b -> a  whole b"),
        ("a b -> a b", [(1, 6)], [(1, 6)], "1 b -> 1 b"),
        ("a 1 -> a", [(4, 1)], [(4,)], "a 1 -> a"),
        ("a -> , a", [(4,)], [(), (4,)], "a -> , a"),
    ],
)
def test_line_on_shapes(
    text: str, inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]], expected: str
) -> None:
    assert str(instantiate(parse_row(text), inputs, outputs)) == expected


@pytest.mark.parametrize(
    ("inputs", "outputs", "why"),
    [
        ([(4, 6), (7, 10)], [(4, 10)], "k is 6 and 7"),
        ([(4, 6)], [(4, 10)], "1 operands, the rule has 2"),
        ([(4, 6), (6, 10)], [(4, 10), (4,)], "2 results, the rule has 1"),
        ([(4,), (6, 10)], [(4, 10)], "rank 1 does not fit 'i k'"),
    ],
)
def test_line_does_not_fit(inputs: list[tuple[int, ...]], outputs: list[tuple[int, ...]], why: str) -> None:
    assert instantiate(parse_row("i k, k n -> i n"), inputs, outputs) == why


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("i k, k n", "one '->'"),
        ("i -> i -> i", "one '->'"),
        ("i -> i; shards 2", "unknown option 'shards'"),
        ("i -> i; whole k", "has the letter 'k'"),
        ("i -> i; reduce i:mean", "sum, max or min"),
        ("i -> i; linear 1", "not there"),
        ("i -> i; linear x", "does not give numbers"),
        ("i -> i; fixed 1", "not there"),
        ("i?, i -> i", "stands before"),
        ("i i -> i", "stands twice"),
        ("(h d) -> h d", "not a letter"),
    ],
)
def test_wrong_line(text: str, why: str) -> None:
    with pytest.raises(TpCompileError, match=why):
        parse_row(text)


def test_every_line_of_the_table_parses() -> None:
    for row in table.ROWS.values():
        if isinstance(row, str):
            parse_row(row)


# Rules of users.


@torch.library.custom_op("tptest::scaled_scan", mutates_args=())
def scaled_scan(x: Tensor, decay: Tensor) -> Tensor:
    """A recurrence over time, in each channel by itself."""
    out = torch.empty_like(x)
    state = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        state = state * decay + x[:, t]
        out[:, t] = state
    return out


@scaled_scan.register_fake
def _(x: Tensor, decay: Tensor) -> Tensor:
    return torch.empty_like(x)


SCAN = "b t c, c -> b t c; whole t; linear 0"


@pytest.fixture
def scan_case() -> Iterator[Case]:
    yield Case(torch.ops.tptest.scaled_scan.default, (signed(4, 6, 10), signed(10)), gradients=False)


def test_operator_without_a_rule_is_whole(scan_case: Case) -> None:
    program = RuleProgram(scan_case)
    assert program.rule == "no rule for tptest.scaled_scan.default"
    assert list(map(str, program.choices())) == ["(R, R) -> R"]


SCAN_OP = torch.ops.tptest.scaled_scan


@pytest.mark.parametrize("name", [SCAN_OP, SCAN_OP.default, "tptest.scaled_scan"], ids=str)
def test_line_of_a_user(scan_case: Case, name: object) -> None:
    register_rule(name, SCAN)  # type: ignore[arg-type]
    program = RuleProgram(scan_case)
    found = program.choices()
    assert list(map(str, found)) == [
        "(R, R) -> R",
        "(S(0), R) -> S(0)",
        "(S(2), S(0)) -> S(2)",
        "(P(sum), R) -> P(sum)",
    ]
    for choice in found:
        compare(program, (3,), [choice])


def test_function_of_a_user_replaces_a_row() -> None:
    register_rule(aten.mm, lambda node: "not today")
    assert RuleProgram(Case(aten.mm.default, (signed(4, 6), signed(6, 10)))).rule == "not today"


def test_rule_of_a_user_that_does_not_fit() -> None:
    register_rule("aten.mm", lambda node: Rule(((), ()), ((),), {}))
    with pytest.raises(TpCompileError, match="does not fit its shapes"):
        RuleProgram(Case(aten.mm.default, (signed(4, 6), signed(6, 10))))
    register_rule("aten.relu", lambda node: Rule((("a",),), (("a",),), {"a": 5}))
    with pytest.raises(TpCompileError, match="not a factorisation of 4"):
        RuleProgram(Case(aten.relu.default, (signed(4),)))


class Scanner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(10, 64, bias=False)
        self.decay = nn.Parameter(torch.rand(64))
        self.down = nn.Linear(64, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.ops.tptest.scaled_scan(self.up(x), self.decay))  # type: ignore[no-any-return]


def test_planner_divides_a_custom_operator() -> None:
    register_rule(torch.ops.tptest.scaled_scan, SCAN)
    model, x = Scanner().double(), torch.randn(2, 5, 10, dtype=torch.float64)
    placed = programs.planned(model, x)
    (scan,) = placed.graph.find_nodes(op="call_function", target=torch.ops.tptest.scaled_scan.default)
    assert placed.decisions[0].nodes[scan].inputs == (Shard(2), Shard(0))
    rewrite(placed, training=False)
    for (result,) in programs.run_ranks(placed, model, x):
        torch.testing.assert_close(result, model(x), rtol=1e-12, atol=1e-12)


# Randomness.


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(x, 0.5, self.training)
        x = nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if self.training else 0.0)
        return x + torch.rand_like(x) * torch.bernoulli(x.sigmoid())


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        (False, ["rand_like", "bernoulli"]),
        (True, ["dropout", "scaled_dot_product_attention", "rand_like", "bernoulli"]),
    ],
)
def test_random_nodes(training: bool, expected: list[str]) -> None:
    graph = torch.export.export(Noisy().train(training), (torch.randn(2, 4, 6, 10),)).graph
    assert [n.target._schema.name.partition("::")[2] for n in random_nodes(graph)] == expected  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (aten.dropout.default, (signed(4, 6), 0.5, True)),
        (aten.native_dropout.default, (signed(4, 6), 0.5, True)),
        (aten.rand_like.default, (signed(4, 6),)),
        (aten.rrelu.default, (signed(4, 6), 0.1, 0.3, True)),
    ],
)
def test_random_operators_are_never_divided(op: object, args: tuple[object, ...]) -> None:
    assert RuleProgram(Case(op, args)).rule == "it draws random numbers"  # type: ignore[arg-type]

"""``tpcompile.check_rule``: rules of users that are right, and that are wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tpcompile
from tpcompile.errors import TpCompileError
from tpcompile.lowering import owned_rows
from tpcompile.rules import table

X, DECAY = torch.rand(4, 6, 10, dtype=torch.float64), torch.rand(10, dtype=torch.float64)


@torch.library.custom_op("tpcheck::smooth", mutates_args=())
def smooth(x: Tensor, decay: Tensor) -> Tensor:
    """A recurrence over time, in each channel by itself."""
    out, state = torch.empty_like(x), torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        state = state * decay + x[:, t]
        out[:, t] = state
    return out


@smooth.register_fake
def _(x: Tensor, decay: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.fixture(autouse=True)
def _no_rules_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_USER", {})


def test_a_rule_that_is_right() -> None:
    tpcompile.register_rule("tpcheck.smooth", "b t c, c -> b t c; whole t; linear 0")
    report = tpcompile.check_rule("tpcheck.smooth", (X, DECAY))
    assert report.ok, report
    assert report.ways == (
        "(R, R) -> R",
        "(S(0), R) -> S(0)",
        "(S(2), S(0)) -> S(2)",
        "(P(sum), R) -> P(sum)",
    )
    assert report.runs >= 4 + 4 + 16
    assert "all right" in str(report)


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [
        ("b t c, c -> b t c; linear 0", "(S(1), R) -> S(1)"),  # time is not free
        ("b t c, c -> b t c; whole t; linear 1", "(R, P(sum)) -> P(sum)"),  # nor is it linear in the decay
    ],
)
def test_rules_that_are_wrong(rule: str, wrong: str) -> None:
    tpcompile.register_rule(torch.ops.tpcheck.smooth, rule)
    report = tpcompile.check_rule(torch.ops.tpcheck.smooth.default, (X,), {"decay": DECAY})
    assert not report.ok
    assert any(each.startswith(f"{wrong} on 2 ranks: result 0") for each in report.wrong)
    assert all(wrong in each for each in report.wrong)


def test_operators_of_torch() -> None:
    """One operand that is given twice; one without a rule; a bias that every rank would add."""
    assert tpcompile.check_rule("aten.mul", (X, X)).ok
    whole = tpcompile.check_rule("tpcheck.smooth", (X, DECAY))
    assert whole.ok
    assert whole.rule.startswith("whole operands only")
    tpcompile.register_rule("aten.linear", "... k, n k, n? -> ... n; linear 0,2; contraction")
    report = tpcompile.check_rule("aten.linear", (X, torch.rand(14, 10).double(), torch.rand(14).double()))
    assert any("P(sum)" in each for each in report.wrong)


def test_what_is_refused() -> None:
    for op, args, match in (
        ("tpcheck.none", (X,), "no operator"),
        ("tpcheck.smooth", (X,), "cannot be run"),
        ("tpcheck.smooth", X, "example_args"),
        (torch.add, (X, X), "op is"),
    ):
        with pytest.raises(TpCompileError, match=match):
            tpcompile.check_rule(op, args)  # type: ignore[arg-type]


@pytest.mark.parametrize("ids", [torch.tensor([4, 0, 5, 2, 2]), torch.tensor([-6, 3, -1])], ids=str)
def test_rows_that_belong_to_whoever_holds_their_expert(ids: Tensor) -> None:
    """Rows of other ranks' experts are no fault, whatever is divided beside the experts; gradients too."""
    for stack in (X[0], torch.rand(6, 4, 10, dtype=torch.float64)):
        report = tpcompile.check_rule("aten.index", (stack, [ids]))
        assert report.ok, report
        assert "(S(0), R) -> O(0 of 6 by x1)" in report.ways


def test_rows_of_a_wrong_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owned_rows, "_from_front", lambda low, node, ids, every: ids)
    report = tpcompile.check_rule("aten.index", (X[0], [torch.tensor([-6, 3, -1])]))
    assert report.wrong
    assert all("O(0 of 6 by x1)" in each for each in report.wrong)


NAN, INF = torch.nan, torch.inf
SPECIAL = {
    "halves": ("aten.linear", (X.half(), torch.rand(14, 10).half(), torch.rand(14).half())),
    "bfloat16": ("aten.mul", (X.bfloat16(), X.bfloat16())),
    "not a number": ("aten.amax", (torch.where(X > 0.9, NAN, X), [1])),
    "infinite": ("aten._softmax", (torch.where(X > 0.8, -INF, X), -1, False)),
    "zeros of both signs": ("aten.atan2", (torch.zeros(4, 6).double(), -torch.zeros(4, 6).double())),
    "from the end": ("aten.index_put", (X, [torch.tensor([-1, 2])], torch.rand(2, 6, 10).double(), True)),
    "nothing in it": ("aten.mul", (X[:, :0], DECAY)),
    "infinite spectra": ("aten._fft_r2c", (torch.where(X > 0.9, INF, X), [2], 0, True)),
    "no parts": ("aten.unbind", (X[:, :0], 1)),
    "a sum of nothing": ("aten.sum", (X[:, :0], [1])),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_examples_with_values_of_their_own(kind: str) -> None:
    op, args = SPECIAL[kind]
    report = tpcompile.check_rule(op, args)
    assert report.ok, report
    assert len(report.ways) >= 2 or kind == "no parts"


@torch.library.custom_op("tpcheck::sum_of_numbers", mutates_args=())
def sum_of_numbers(x: Tensor) -> Tensor:
    """The sum of what is a number; if nothing is, it is none itself."""
    return torch.where(x.isnan().all(-1), torch.nan, x.nansum(-1))


@sum_of_numbers.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1])


def test_a_rule_that_only_special_values_show_to_be_wrong() -> None:
    tpcompile.register_rule("tpcheck.sum_of_numbers", "... d -> ...")
    assert tpcompile.check_rule("tpcheck.sum_of_numbers", (X,)).ok
    holes = X.clone()
    holes[..., :5] = torch.nan
    report = tpcompile.check_rule("tpcheck.sum_of_numbers", (holes,))
    assert any("(S(2)) -> P(sum) on 2 ranks" in each for each in report.wrong)

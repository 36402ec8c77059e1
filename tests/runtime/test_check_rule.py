"""``tpcompile.check_rule``: rules of users that are right, and that are wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import tpcompile
from tpcompile.errors import TpCompileError
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

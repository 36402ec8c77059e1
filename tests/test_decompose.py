"""Composite operators that no rule knows are captured as what torch composes them of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests import programs
from tpcompile.capture.decompose import decomposed_names
from tpcompile.rules import table
from tpcompile.rules.rule import Rule
from tpcompile.rules.table import register_rule


class Aliases(nn.Module):
    """A feed-forward layer written with the second names of operators, and a transform."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.multiply(self.up(x), torch.absolute(self.up(x)))
        joined = torch.concat([self.down(inner), torch.subtract(x, 1.0)], dim=1)
        y: Tensor = torch.fft.fftn(joined, dim=(1, 2)).real
        return y


def _targets(model: nn.Module, x: Tensor) -> set[str]:
    return {str(n.target) for n in programs.captured(model, x).graph.nodes if n.op == "call_function"}


def test_aliases_are_what_they_stand_for() -> None:
    model, x = Aliases().double(), torch.randn(2, 5, 12, dtype=torch.float64)
    work = programs.planned(model, x)
    assert work.planned_factors is not None
    assert all(isinstance(rule, Rule) for rule in work.planned_factors.rules.values())
    with torch.no_grad():
        torch.testing.assert_close(programs.run_whole(work, model, x), [model(x)])


def test_a_users_rule_keeps_its_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_USER", {})
    model, x = Aliases(), torch.randn(2, 5, 12)
    assert "aten.fft_fftn.default" not in _targets(model, x)
    before = decomposed_names()
    register_rule("aten.fft_fftn", "b s h -> b s h; whole s h; linear 0")
    assert "aten.fft_fftn.default" in _targets(model, x)
    assert decomposed_names() != before  # so that captures on disk are told apart


def test_operators_with_rules_stay() -> None:
    kept = {"aten.linear.default", "aten.scaled_dot_product_attention.default", "aten.layer_norm.default"}
    assert not kept & set(decomposed_names())
    assert "aten.multiply.Tensor" in decomposed_names()

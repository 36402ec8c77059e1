"""Attention kernels: divided by heads, with what their python reads, packed rows, windows and sinks."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

import tpcompile
from tests.helpers import flash_attention
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import attention_kernels

F32 = 1e-5


@pytest.mark.parametrize(
    ("ranks", "counts", "how"),
    [(4, (), {}), (3, (6, 2), {}), (2, (), {"backend": "aot_eager"}), (2, (), {"alone": True})],
)
def test_flex_attention_knows_heads_by_their_numbers(
    ranks: int, counts: tuple[int, ...], how: dict[str, Any]
) -> None:
    for found in run_spmd(partial(attention_kernels.heads, **how), ranks, *counts, timeout=300):
        assert found["worst"] <= F32
        assert found["gradients"] <= F32
        assert not found["fallbacks"]
        assert found["whole"] == (["k.weight", "v.weight"] if ranks == 3 else [])  # shared by all


def test_masks_of_flex_attention_may_read_nothing() -> None:
    assert max(run_spmd(attention_kernels.causal, 2)) <= F32


def test_what_objects_of_torchs_hold_may_change() -> None:
    for errors in run_spmd(attention_kernels.held, 2):
        assert max(errors) <= F32, errors


@pytest.mark.parametrize(("autocast", "most"), [(False, F32), (True, 0.1)])
def test_flex_attention_in_programs_that_are_traced_again(autocast: bool, most: float) -> None:
    """Under autocast (a bfloat16 has eight bits), and where operators are taken apart; in a checkpoint."""
    for errors in run_spmd(attention_kernels.around, 2, autocast):
        assert max(errors) <= most


def test_flex_attention_of_transformers() -> None:
    for found in run_spmd(attention_kernels.flex, 2, "gemma2", timeout=300):
        assert max(found["errors"].values()) <= F32, found["errors"]
        assert found["generated"]
        assert found["whole"] == []


def test_flash_attention_of_transformers() -> None:
    """By its functions of autograd, which keep their backward; rows that are packed say where they begin."""
    for found in run_spmd(attention_kernels.flash, 2, "mistral", timeout=300):
        assert max(found["errors"].values()) <= F32, found["errors"]
        assert found["gradients"] <= F32
        assert found["generated"]
        assert not any("autograd_function" in line for line in found["fallbacks"])
        assert found["whole"] == []
        assert "attention_mask hides tokens" in found["refused"][0]
        assert "position_ids begin anew" in found["refused"][1]


class Biased(nn.Module):
    """Attention of two heads to whose scores the same learned bias is added."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, 8) for _ in range(3))
        self.out, self.bias = nn.Linear(8, 12), nn.Parameter(torch.randn(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        parts = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out: Tensor = self.out(scaled_dot_product_attention(*parts, self.bias).transpose(1, 2).flatten(2))
        return out


def test_a_rank_without_heads_takes_part_in_the_gradient_of_a_mask() -> None:
    plan = {"q": "colwise", "k": "colwise", "v": "colwise", "out": "rowwise"}
    example = (torch.randn(2, 5, 12, dtype=torch.float64),)
    assert tpcompile.verify(Biased().double(), 3, example, plan=plan).ok


class Drops(nn.Module):
    """Attention with a dropout that a kernel would draw."""

    def __init__(self, operator: bool) -> None:
        super().__init__()
        self.operator, self.q = operator, nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, 8))
        if not self.operator:
            return flash_attention.flash_attn_func(q, q, q, dropout_p=0.1)
        options = (0.1, 0.3, True, -1, -1, 0.0, None, False)
        found: Tensor = torch.ops.flash_attn._flash_attn_forward(q, q, q, *options)[0]
        return found


@pytest.mark.parametrize(
    ("operator", "message"), [(False, "has a dropout_p"), (True, "draws random numbers")]
)
def test_a_kernels_dropout_is_refused(operator: bool, message: str) -> None:
    with pytest.raises(tpcompile.TpCompileError, match=message):
        tpcompile.plan(Drops(operator), 2, (torch.randn(2, 5, 8),))


def test_rules_for_kernels_of_norms() -> None:
    """Right without a rule, and computed whole; with one, in either form, heads stay divided."""
    for without, with_rules in run_spmd(attention_kernels.norms, 2, timeout=300):
        assert max(*without[:2], *with_rules[:2]) <= F32
        assert len(without[2]) == 2 and not with_rules[2]


class Scored(nn.Module):
    """Flex attention with a function of scores that no program can have, or none."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.q = kind, nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, kept = self.q(x).unflatten(-1, (2, 8)).transpose(1, 2), torch.zeros(2)

        def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return value + torch.rand(()) if self.kind == "draws" else value + kept.add_(1)[h]

        found: Tensor = flex_attention(q, q, q, score)
        return found


@pytest.mark.parametrize("kind", ["draws", "writes"])
def test_functions_of_scores_that_are_refused(kind: str) -> None:
    with pytest.raises(tpcompile.TpCompileError, match="draws random numbers, or writes"):
        tpcompile.plan(Scored(kind), 2, (torch.randn(2, 5, 8),))

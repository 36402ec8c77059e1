"""Random numbers: the same where ranks hold the same elements, and the right part where they hold a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from tests.helpers.golden_text import stable_text
from tests.helpers.programs import canonicalised, captured, gradients_agree, planned, run_ranks, run_whole
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import randomness as spmd_randomness
from tpcompile.lowering import simulate
from tpcompile.passes.expand_randomness import ExpandRandomness
from tpcompile.passes.pipeline import run_passes
from tpcompile.pipeline import rewrite
from tpcompile.rules.randomness import random_nodes

aten = torch.ops.aten
uniform = torch.ops.tpcompile.uniform
SEED = torch.tensor([123456789, 987654321])


def test_uniform_numbers_are_uniform_and_independent() -> None:
    like = torch.empty(32, 64, 48)
    u = uniform(like, SEED, 3, [])
    assert u.dtype == torch.float32 and float(u.min()) >= 0 and float(u.max()) < 1
    counts = torch.histc(u, 64)
    expected = u.numel() / 64
    assert 0.5 < float(((counts - expected) ** 2 / expected).sum()) / 63 < 1.6
    others = [
        uniform(like, SEED, 4, []),
        uniform(like, SEED + 1, 3, []),
        u.roll(1, 0),
        u.roll(1, 1),
        u.roll(1, 2),
    ]
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack([u.flatten(), other.flatten()]))[0, 1])) < 0.02
    # Rates of rows, of columns and of planes scatter as those of independent bits do.
    kept = (u >= 0.1).float()
    for dims in ((2,), (1, 2), (0, 1)):
        rates = kept.mean(dims)
        spread = (0.09 * rates.numel() / u.numel()) ** 0.5
        assert 0.7 < float(rates.std()) / spread < 1.3


def test_a_part_of_the_numbers_is_the_right_part() -> None:
    u = uniform(torch.empty(3, 8, 24), SEED, 0, [])
    half = uniform(torch.empty(3, 8, 12), SEED, 0, [2, 1, 24, 12, 12])
    assert torch.equal(half, u[:, :, 12:])
    # Dimension 2 is (4 6), of each six the last four.
    inner = uniform(torch.empty(3, 8, 16), SEED, 0, [2, 2, 4, 4, 0, 6, 4, 2])
    assert torch.equal(inner, u.view(3, 8, 4, 6)[..., 2:].reshape(3, 8, 16))
    assert uniform(torch.empty(3, 0), SEED, 0, [1, 1, 4, 0, 4]).shape == (3, 0)
    assert uniform(torch.empty(()), SEED, 0, []).shape == ()


class Block(nn.Module):
    """Attention and an MLP with dropout everywhere, one on a divided value, one on a whole one."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(20, n) for n in (24, 12, 12))
        self.o, self.up, self.down = nn.Linear(24, 20), nn.Linear(20, 44), nn.Linear(44, 20)
        self.causal = causal

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t = x.shape[:2]
        q = self.q(x).view(b, t, 4, 6).transpose(1, 2)
        k, v = (f(x).view(b, t, 2, 6).transpose(1, 2) for f in (self.k, self.v))
        given = {"is_causal": True} if self.causal else {"attn_mask": mask}
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3, enable_gqa=True, **given)
        x = x + F.dropout(self.o(y.transpose(1, 2).flatten(2)), 0.2)
        y = F.dropout(F.gelu(self.up(x)), 0.4)
        y = F.dropout2d(y[..., None], 0.2)[..., 0]
        noise = torch.rand_like(y) + torch.randn(b, 1, 44, dtype=y.dtype)
        return x + self.down(y + 0.1 * noise * torch.bernoulli(torch.full_like(y, 0.5)))


def inputs() -> tuple[Tensor, Tensor]:
    """A batch, and a mask that hides some keys."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 20, generator=generator, dtype=torch.float64)
    return x, torch.rand(5, 5, generator=generator) > 0.3


class Drops(nn.Module):
    """A dropout, and an attention with one."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(12, 20)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.proj(x), 0.25).unflatten(-1, (4, 5)).transpose(1, 2)
        return F.scaled_dot_product_attention(y, y, y, is_causal=True, dropout_p=0.5)


def test_golden_text(golden: Callable[[str, str], None]) -> None:
    program = captured(Drops().train(), torch.randn(3, 7, 12))
    before, calls = stable_text(program), program.call_count()
    one = ExpandRandomness()
    run_passes(program, [one])
    assert program.call_count() - calls == 16
    text = f"before {one.name}:\n{before}\n\nafter {one.name}:\n{stable_text(program)}\n"
    golden("expand_randomness_drops", text)


def unseeded(lowered: list[GraphModule]) -> list[GraphModule]:
    """Programs whose seed is zero, as that of a graph at global shapes."""
    for local in lowered:
        for node in local.graph.find_nodes(op="call_function", target=aten.randint.low):
            node.target, node.args = aten.zeros.default, ([2],)
    return lowered


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_draw_what_one_would(ranks: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Block(causal).double().train()
    program = planned(model, *inputs(), ranks=ranks)
    drawn = program.graph.find_nodes(op="call_function", target=uniform.default)
    assert len(drawn) == 7 and not random_nodes(program.graph)
    divided = [n for n in drawn if any(d.nodes[n].factor for d in program.decisions if n in d.nodes)]
    assert divided, "no mask is divided"
    rewrite(program, training=True)
    expected = run_whole(program, model, *inputs())
    for mine in run_ranks(program, model, *inputs(), lowered=unseeded(simulate.lower_all(program))):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11)
    lower_all = simulate.lower_all
    monkeypatch.setattr(simulate, "lower_all", lambda w: unseeded(lower_all(w)))
    gradients_agree(program, model, *inputs())


def test_expanding_keeps_rates_and_expectations() -> None:
    model = nn.Sequential(nn.Dropout(0.25)).double().train()
    x = torch.ones(200, 200, dtype=torch.float64)
    program = canonicalised(model, x)
    (y,) = run_whole(program, model, x)
    assert set(y.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs(float((y == 0).double().mean()) - 0.25) < 0.01


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_ends(p: float) -> None:
    model = nn.Sequential(nn.Dropout(p)).double().train()
    x = torch.randn(4, 6, dtype=torch.float64)
    (y,) = run_whole(canonicalised(model, x), model, x)
    assert torch.equal(y, x * (1 - p))


def test_what_is_not_known_stays_random() -> None:
    class Permutes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[torch.randperm(4)]

    assert len(random_nodes(canonicalised(Permutes(), torch.randn(4, 2)).graph)) == 1


def check_training(found: dict[str, Any]) -> None:
    assert found["forward"] <= 1e-11
    assert found["gradients"] <= 1e-11
    assert found["again"] and found["checkpointed"] and found["other"] and found["layers"]


def test_training_gpt2_with_its_dropout() -> None:
    for found in run_spmd(spmd_randomness.train, 2, timeout=300):
        check_training(found)


def test_compiled() -> None:
    for found in run_spmd(spmd_randomness.compiled, 2, timeout=300):
        assert found["consistent"] <= 1e-5
        assert found["agree"] and found["other"]
        assert abs(found["rate"] - 0.4) < 0.02


def test_operators_of_the_users() -> None:
    """Those that draw are refused when they have, and the generators are as they were."""
    for found in run_spmd(spmd_randomness.foreign, 2, timeout=300):
        assert found[:6] == ["accepted", "False", "accepted"] * 2
        assert found[7::3] == ["True"] * 2
        assert all("every rank would have its own" in told for told in [*found[6::3], *found[8::3]])

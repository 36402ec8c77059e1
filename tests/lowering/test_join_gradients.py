"""Gradients of small weights that the ranks add up are sent together, and are what they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers import programs, toys
from tests.helpers.run_ranks import run_spmd
from tests.on_ranks import joined
from tpcompile.ir.print_graph import graph_text
from tpcompile.lowering import simulate
from tpcompile.pipeline import rewrite

OPS = torch.ops.tpcompile


class NormedQueries(nn.Module):
    """Norms within each head: their weights are whole, the heads are divided."""

    def __init__(self, heads: int = 4, size: int = 6) -> None:
        super().__init__()
        self.q, self.k, self.out = (nn.Linear(heads * size, heads * size) for _ in range(3))
        self.first, self.second = nn.LayerNorm(size), nn.RMSNorm(size)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        q, k = (part(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for part in (self.q, self.k))
        y = F.scaled_dot_product_attention(self.first(q), self.second(k), k)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize(
    ("make", "width", "sequence", "sizes"),
    [(toys.Blocks, 12, True, [12] * 4), (NormedQueries, 24, False, [6] * 3)],
    ids=["norms of divided positions", "norms within heads"],
)
def test_one_message(make: type[nn.Module], width: int, sequence: bool, sizes: list[int]) -> None:
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(3, 8, width, dtype=torch.float64)
    work = programs.planned(model, x, ranks=2, dynamic=True)
    rewrite(work, training=True, sequence=sequence)
    for program in simulate.lower_all(work):
        (joined,) = program.graph.find_nodes(op="call_function", target=OPS.copy_all_to_ranks.default)
        assert [weight.meta["val"].numel() for weight in joined.args[0]] == sizes
        copies = program.graph.find_nodes(op="call_function", target=OPS.copy_to_ranks.default)
        assert all(copy.args[0].op != "placeholder" or copy.args[0].meta["val"].ndim > 1 for copy in copies)
    programs.gradients_agree(work, model, x)


def test_text(golden: Callable[[str, str], None]) -> None:
    """Views of norms' weights stand first; the norm in front of the first sum is whole."""
    work = programs.planned(toys.Blocks(), torch.randn(3, 8, 12), ranks=2, dynamic=False)
    rewrite(work, training=True, sequence=True)
    golden("join_gradients_norms", graph_text(simulate.lower_all(work)[0].graph))


def test_on_ranks() -> None:
    """One all-reduce for the norms; what has no gradient unsharded has none here."""
    for found in run_spmd(joined.ways, 2):
        assert max(error for error, _, _ in found.values()) <= 1e-12, found
        frozen, last = ["second.bias"], ["last.weight", "last.bias"]
        for name, (_, missing, _) in found.items():
            assert missing == (frozen if name.endswith("both") else [*frozen, *last]), name
        # One more is that of what the first linear layer reads.
        assert {reduced for _, _, reduced in found.values()} == {2}, found


def test_a_result_that_no_loss_uses() -> None:
    """Its sum travels with the other one's, but its weights have no gradient, as unsharded."""
    for sent, error, missing in run_spmd(joined.one_of_two, 2):
        assert sent == 1 and error <= 1e-12
        assert missing and all(name.startswith("first.") for name in missing)

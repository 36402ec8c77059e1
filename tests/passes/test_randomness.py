"""Random numbers that are not made functions of their place are refused, not drawn otherwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.programs import canonicalised
from tpcompile.errors import TpCompileError
from tpcompile.rules.randomness import refuse_randomness


class _Noise(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return x + self.draw(x)


@pytest.mark.parametrize(
    "draw",
    [
        torch.randn_like,
        torch.rand_like,
        lambda x: torch.randn(x.shape, dtype=torch.complex64),
        lambda x: torch.rand(x.shape, dtype=torch.complex64),
    ],
)
def test_complex_numbers_are_refused(draw: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(TpCompileError, match="random numbers in a way that is not supported"):
        refuse_randomness(canonicalised(_Noise(draw), torch.zeros(4, 6, dtype=torch.complex64)).graph)
    refuse_randomness(canonicalised(_Noise(torch.randn_like), torch.zeros(4, 6)).graph)

"""The function that fetches a program's inputs, against the feeds that it was made from."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from tpcompile.runtime.fetch_inputs import Feed, make_fetch


class _Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_values_are_those_of_now() -> None:
    """Weights replaced, by name in a list too, or computed from others are what the next call gets."""
    linear, listed = nn.Linear(3, 4), nn.ParameterList([torch.ones(2), torch.zeros(2)])
    constant = torch.arange(3)
    feeds = (Feed(linear, "weight", segment=(0, 1, 2)), 1, Feed(listed, "1"), Feed(None, "c", constant), 0)
    fetch = make_fetch(feeds)
    leaves = [torch.randn(1), torch.randn(2)]

    def check() -> None:
        wanted = [leaves[f] if isinstance(f, int) else f.get() for f in feeds]
        for got, want in zip(fetch(leaves), wanted, strict=True):
            assert torch.equal(got, want)

    check()
    linear.weight = nn.Parameter(torch.randn(4, 3))
    listed[1] = nn.Parameter(torch.full((2,), 7.0))
    check()
    assert fetch(leaves)[2].tolist() == [7.0, 7.0]


def test_computed_weights_are_those_of_now() -> None:
    linear = nn.Linear(3, 4)
    parametrize.register_parametrization(linear, "weight", _Doubled())
    feed = Feed(linear, "weight")
    fetch = make_fetch((feed,))
    with torch.no_grad():
        linear.parametrizations["weight"].original.add_(1)  # type: ignore[index, operator]
    assert torch.equal(fetch(())[0], feed.get())


def test_compiled_code_notices_a_new_weight() -> None:
    linear = nn.Linear(3, 4)
    fetch = make_fetch((Feed(linear, "weight"), 0))

    def multiply(x: torch.Tensor) -> torch.Tensor:
        weight, given = fetch([x])
        result: torch.Tensor = given @ weight.t()
        return result

    compiled = torch.compile(multiply, fullgraph=True, backend="eager")
    x = torch.randn(2, 3)
    torch.testing.assert_close(compiled(x), multiply(x))
    linear.weight = nn.Parameter(torch.randn(4, 3))
    torch.testing.assert_close(compiled(x), multiply(x))
    linear.weight.data = torch.randn(4, 3)
    torch.testing.assert_close(compiled(x), multiply(x))

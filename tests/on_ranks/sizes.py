"""Models whose result depends on a size in a way that no general size shows, and calls of many sizes."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tpcompile
from tests.on_ranks.models import mesh


class Core(nn.Module):
    """Two layers, of which one is divided by rows and one by columns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def core(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


class BatchBranch(Core):
    def forward(self, x: Tensor) -> Tensor:
        y = self.core(x)
        return y if x.shape[0] == 1 else y - y.mean(0, keepdim=True)


class LengthBranch(Core):
    def forward(self, x: Tensor) -> Tensor:
        return self.core(x) * (10.0 if x.size(1) < 2 else 1.0)


class Squeezed(Core):
    def forward(self, x: Tensor) -> Tensor:
        return self.core(x).squeeze(0)


class LastTwo(Core):
    """A slice that is as long as what it is taken from, if that is short."""

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x)[:, -2:]


class Empty(Core):
    def forward(self, x: Tensor) -> Tensor:
        return self.core(x) if x.numel() else x + 1


class Attends(nn.Module):
    """Cross attention, whose packed key-value projection has as many parts as there are sentences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x[:, :1] + x, x, need_weights=False)[0]
        return y


MODELS = (BatchBranch, LengthBranch, Squeezed, LastTwo, Empty, Attends)
SIZES = ((2, 6), (1, 6), (2, 1), (1, 1), (3, 5), (2, 2))


def sizes() -> dict[str, tuple[float, int]]:
    """Per model, the worst error over calls of all sizes, and the number of programs."""
    found = {}
    for kind in MODELS:
        whole = kind()
        sharded = tpcompile.parallelize(copy.deepcopy(whole), mesh(), (torch.zeros(2, 6, 16),))
        every = [*SIZES, (0, 6)] if kind is Empty else SIZES
        errors = [_error(sharded, whole, torch.randn(*shape, 16)) for shape in every]
        found[kind.__name__] = max(errors), len(sharded.programs)
    return found


def _error(sharded: nn.Module, whole: nn.Module, *args: Any) -> float:
    with torch.no_grad():
        mine, theirs = sharded(*args), whole(*args)
    assert mine.shape == theirs.shape
    return float((mine - theirs).abs().max()) if mine.numel() else 0.0


class Positioned(Core):
    """Counts positions, as a cache that the model keeps by itself does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(64, 16))

    def forward(self, x: Tensor, position: int) -> Tensor:
        return self.core(x + self.table[position : position + x.shape[1]])


class Kept(Core):
    """Asks whether a number is one, which a symbol is not."""

    def forward(self, x: Tensor, keep: int) -> Tensor:
        chosen = slice(-keep, None) if isinstance(keep, int) else keep
        return self.core(x)[:, chosen]


class Scaled(Core):
    def forward(self, x: Tensor, scale: float) -> Tensor:
        return self.core(x) * scale


class Divided(Core):
    def forward(self, x: Tensor, by: float) -> Tensor:
        return self.core(x) / by


def values_that_are_not_what_they_equal() -> tuple[bool, int]:
    """Whether a zero's sign counts; the programs of both signs and of two calls that are given no number."""
    whole, x = Divided(), torch.randn(2, 12, 16)
    sharded: Any = tpcompile.parallelize(copy.deepcopy(whole), mesh(), (x, 0.0))
    with torch.no_grad():
        right = all(torch.equal(sharded(x, by) > 0, whole(x, by) > 0) for by in (0.0, -0.0))
        for _ in range(2):
            sharded(x, math.nan)
    return right, len(sharded.programs)


class Asks(Core):
    """Treats parameters otherwise than other tensors; hands on what it was given."""

    def forward(self, x: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
        scaled = x * 2 if isinstance(x, nn.Parameter) else x
        return self.core(scaled) * by + (1 if isinstance(by, nn.Parameter) else 0), x


def parameters_among_arguments() -> tuple[float, int]:
    """The worst error of calls that are given parameters, or not; how many programs there are."""
    whole, x, by = Asks(), torch.randn(2, 12, 16), torch.ones(16)
    sharded: Any = tpcompile.parallelize(copy.deepcopy(whole), mesh(), (x, by))
    calls = [(nn.Parameter(x), by), (x, by), (x, nn.Parameter(by)), (nn.Parameter(x[:, :5]), by), (x, by)]
    errors = [(sharded(*args)[0] - whole(*args)[0]).abs().max() for args in calls]
    return float(torch.stack(errors).max()), len(sharded.programs)


def numbers() -> dict[str, tuple[float, int, int]]:
    """Per model, the worst error over calls with many numbers; how many programs there are, and warnings."""
    found = {}
    for kind, step in ((Positioned, 1), (Kept, 1), (Scaled, 0.5)):
        whole = kind()
        sharded = tpcompile.parallelize(copy.deepcopy(whole), mesh(), (torch.zeros(2, 12, 16), 0 * step))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            errors = [_error(sharded, whole, torch.randn(2, 12, 16), n * step) for n in range(11)]
            count = len(sharded.programs)
            errors.append(_error(sharded, whole, torch.randn(2, 12, 16), 10 * step))
            assert len(sharded.programs) == count  # what was captured last is found again
        told = [w for w in said if "values" in str(w.message)]
        found[kind.__name__] = max(errors), len(sharded.programs), len(told)
    return found


class Seeded(Core):
    def forward(self, x: Tensor, seed: int) -> Tensor:
        return self.core(x) * (1 + seed % 5)


def large_numbers() -> float:
    """The worst error over calls with numbers that are no sizes."""
    whole, x = Seeded(), torch.randn(2, 12, 16)
    sharded = tpcompile.parallelize(copy.deepcopy(whole), mesh(), (x, 3))
    return max(_error(sharded, whole, x, seed) for seed in (4, 2**70 + 1, 6, 2**64))


@dataclass
class Sample:
    """A result whose type is registered with pytree, without keys."""

    sample: Tensor
    more: dict[str, Tensor]


pytree.register_pytree_node(
    Sample,
    lambda s: ([s.sample, s.more], None),
    lambda values, _: Sample(*values),
    serialized_type_name="tests.Sample",
)


class Sampled(Core):
    """Takes and returns such a type."""

    def forward(self, given: Sample) -> Sample:
        return Sample(self.core(given.sample), {"twice": self.core(given.more["x"]) * 2})


def without_keys() -> float:
    """The error of a model whose argument and result are of a type without keys."""
    whole, x = Sampled(), torch.randn(3, 16)
    given = Sample(x, {"x": x + 1})
    sharded = tpcompile.parallelize(copy.deepcopy(whole), mesh(), (given,))
    mine, theirs = sharded(given), whole(given)
    assert type(mine) is Sample
    pairs = ((mine.sample, theirs.sample), (mine.more["twice"], theirs.more["twice"]))
    return max(float((a - b).abs().max()) for a, b in pairs)

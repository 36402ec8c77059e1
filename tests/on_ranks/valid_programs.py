"""Valid programs that are hard to divide, on every rank beside the unsharded model, with gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import tpcompile
from tests.on_ranks.models import mesh
from tpcompile.rules import table


def noise(*shape: int) -> Tensor:
    """The same numbers on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


class Between(nn.Module):
    """A function of the features that one linear layer makes, and a linear layer behind it."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int, left: int | None = None) -> None:
        super().__init__()
        self.first, self.function = nn.Linear(6, width), function
        self.second = nn.Linear(left or width, 5)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.second(self.function(self.first(x)))
        return made


def sharded(model: nn.Module, *args: Any, **options: Any) -> tuple[Any, nn.Module]:
    """The model in double precision, sharded for an example call and as it was."""
    torch.manual_seed(0)
    whole = copy.deepcopy(model.double())
    return tpcompile.parallelize(model, mesh(), args, **options), whole


def agree(model: Any, whole: nn.Module, *args: Any) -> None:
    """Compares a call of both, and the gradients of a loss in which every element counts."""
    got, want = model(*args), whole(*args)
    torch.testing.assert_close(got, want, equal_nan=True)
    if want.requires_grad:
        seed = noise(*want.shape)
        for each, result in ((model, got), (whole, want)):
            each.zero_grad()
            (result * seed).sum().backward()
        mine = dict(model.named_parameters())
        for name, param in whole.named_parameters():
            grad = mine[name].grad
            if param.grad is None:
                assert grad is None or not grad.any(), name
                continue
            wanted = model.plan.layout.shard(name, param.grad, dist.get_rank())
            grad = grad.to_local()
            torch.testing.assert_close(grad, wanted, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def register_picky(name: str, runs: Callable[[Tensor], bool]) -> Callable[[Tensor], Tensor]:
    """An operator with a rule, which refuses some shapes: its double, where it runs."""

    def double(x: Tensor) -> Tensor:
        if not runs(x):
            raise ValueError("not of this shape")
        return x * 2

    op = torch.library.custom_op(f"valid::{name}", double, mutates_args=(), schema="(Tensor x) -> Tensor")
    op.register_fake(double)
    op.register_autograd(lambda ctx, grad: grad * 2)
    tpcompile.register_rule(f"valid.{name}", "... -> ...; linear 0")
    return lambda x: op(x)  # which can be copied


def refused_by_operators() -> list[str]:
    """Operators that refuse all parts, and one rank's part alone; what the plans say."""
    notes = []
    with mock.patch.dict(table._USER):  # other tests' ranks have no such rules
        whole_only = register_picky("whole_only", lambda x: x.shape[-1] == 8)
        not_three = register_picky("not_three", lambda x: x.shape[-1] != 3)
        for function, width in ((whole_only, 8), (not_three, 7)):
            model, whole = sharded(Between(function, width), noise(4, 6))
            agree(model, whole, noise(4, 6))
            notes += model.plan.fallbacks
    return notes


class SplitOtherwise(nn.Module):
    """Thirty channels, which something else splits in three, in two groups."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer = nn.Linear(6, 30), layer
        self.parts = nn.ModuleList(nn.Linear(10, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        p, q, r = (layer(part) for layer, part in zip(self.parts, h.split(10, -1), strict=True))
        return torch.cat([self.layer(h.transpose(1, 2)).flatten(1), (p + q * r).flatten(1)], 1)


def channels_split_otherwise() -> None:
    """Layers with groups of channels."""
    layers = (
        nn.Conv1d(30, 8, 3, padding=1, groups=2),
        nn.ConvTranspose1d(30, 12, 3, groups=6),
        nn.GroupNorm(2, 30),
        nn.Conv1d(30, 60, 3, padding=1, groups=30),
    )
    for layer in layers:
        agree(*sharded(SplitOtherwise(layer), noise(4, 5, 6)), noise(4, 5, 6))


class Means(nn.Module):
    """Means over sizes that are not known together with features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, width) for width in (14, 8, 7))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = (layer(x) for layer in self.layers)
        return torch.cat([a.mean((1, 2)), b.flatten(1).mean(1), c.mean()[None], c.mean((0, -1))[:2]])


def means() -> set[str]:
    """Means at two lengths; the collectives of the plan."""
    model, whole = sharded(Means(), noise(4, 5, 6))
    for length in (5, 8):
        agree(model, whole, noise(4, length, 6))
    return {c.kind for c in model.plan.collectives}


class Several(nn.Module):
    """A model that uses its weights in the way that is asked for."""

    def __init__(self, ways: dict[str, Callable[[Any, Tensor], Tensor]], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.ways = ways
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(noise(*shape)))

    def forward(self, x: Tensor, way: str) -> Tensor:
        return self.ways[way](self, x)


def mlp(m: Any, x: Tensor) -> Tensor:
    """Weights in matmuls, as the first call has them."""
    return F.linear(F.linear(x, m.up).relu(), m.down)


def attention(m: Any, x: Tensor) -> Tensor:
    """A packed projection with segments of different sizes: four query heads, two key and value heads."""
    q, k, v = (
        part.unflatten(-1, (-1, 4)).transpose(1, 2) for part in F.linear(x, m.up).split([16, 8, 8], -1)
    )
    mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return F.linear(mixed.transpose(1, 2).flatten(2), m.down)


PLAIN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "first": mlp,
    "summed": lambda m, x: m.up.sum(0) * x,
    "sorted": lambda m, x: F.linear(x, m.up.sort(0).values),
    "other units": lambda m, x: F.linear(x, m.up).unflatten(-1, (5, 3)).softmax(1).flatten(2),
    "coarser units": lambda m, x: F.linear(x, m.up).unflatten(-1, (3, 5)).softmax(-1).flatten(2),
    "on its own": lambda m, x: m.down.exp(),
    "transposed": lambda m, x: F.linear(x, (m.down @ m.up).cumsum(0)),
}
PACKED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "first": attention,
    "in one piece": lambda m, x: F.linear(x, m.up),
    "cut elsewhere": lambda m, x: F.linear(F.linear(x, m.up).split([20, 12], -1)[1], m.down[:, :12]),
    "its values": lambda m, x: x * m.up.norm(dim=0),
}


def later_calls() -> dict[str, list[str]]:
    """Calls that use weights otherwise than the call that they were divided for; what their plans say."""
    found: dict[str, list[str]] = {}
    for ways, shapes in (
        (PLAIN, {"up": (15, 6), "down": (4, 15)}),
        (PACKED, {"up": (32, 6), "down": (6, 16)}),
    ):
        model, whole = sharded(Several(ways, **shapes), noise(2, 5, 6), "first")
        held = sum(p.to_local().numel() for p in model.parameters())
        assert held < sum(p.numel() for p in whole.parameters())
        for way in ways:
            agree(model, whole, noise(2, 5, 6), way)
            found[way] = [note for note in model.plan.notes if "gathered" in note]
    return found


class Weights(nn.Module):
    """Weights in buffers (of eight bits, packed, looked up), joined ones, and such as stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", (noise(8, 6) * 30).to(torch.int8))
        self.register_buffer("packed", torch.randint(0, 255, (6, 4), dtype=torch.uint8))
        self.register_buffer("table", noise(5, 6))
        self.register_buffer("scale", noise(8))
        self.one, self.other = nn.Parameter(noise(3, 6)), nn.Parameter(noise(3, 6))
        self.first, self.plain = nn.Linear(6, 6), noise(6, 6)
        self.register_buffer("derived", noise(6, 6), persistent=False)
        self.bilinear, self.bag = nn.Bilinear(6, 6, 6), nn.EmbeddingBag(9, 6)

    def forward(self, x: Tensor, write: bool = False) -> Tensor:
        if write:
            self.weight.add_(1)
        x = F.linear(F.linear(x, torch.cat([self.one, self.other])), self.derived)
        x = self.first(x + F.embedding(torch.zeros(4, dtype=torch.long), self.table)) @ self.plain
        x = self.bilinear(x, x) + self.bag(torch.tensor([[1, 5]] * 4))
        x = F.linear(x, (self.weight.to(x.dtype) - 3 * self.scale[:, None]) / self.scale[:, None])
        halves = torch.stack([self.packed & 15, self.packed >> 4], -1).flatten(1)
        return F.linear(x, halves.to(x.dtype))


def weights_elsewhere() -> tuple[list[str], list[str]]:
    """What the plan says of weights that are not divided; which are, and go on living as weights do."""
    model, whole = sharded(Weights(), noise(4, 6), dynamic=False)
    x = noise(4, 6)
    agree(model, whole, x)
    state = {name: value.flip(0) if value.ndim else value for name, value in whole.state_dict().items()}
    for each in (model, whole):
        each.load_state_dict(state)
        each.table = each.table + 1
        each.weight.copy_(torch.arange(48).view(8, 6).to(torch.int8))
    agree(model, whole, x)
    agree(model, whole, x, True)  # a later call writes what the first has divided
    agree(copy.deepcopy(model), whole, x)
    torch.testing.assert_close(model.full_state_dict(), whole.state_dict())
    divided = [name for name, held in model.plan.layout.params.items() if not held.is_whole]
    return list(model.plan.notes), divided

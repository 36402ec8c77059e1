"""What a model's python can find out about a call beside values: which tensors are one, gradients, sizes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import tpcompile
from tests.on_ranks.models import mesh
from tests.on_ranks.module_life import refusal

X, Y = torch.linspace(-1, 1, 24).view(3, 8), torch.linspace(2, -1, 24).view(3, 8)
LONGER = torch.linspace(-1, 2, 40).view(5, 8)

Forward = Callable[..., Any]


class Asking(nn.Module):
    """Two layers, and a question between them."""

    def __init__(self, ask: Forward) -> None:
        super().__init__()
        self.up, self.down, self.ask = nn.Linear(8, 16), nn.Linear(16, 8), ask
        self.seen: dict[str, int] = {}

    def forward(self, x: Tensor, *others: Tensor, memory: Tensor | None = None) -> Any:
        h = self.down(self.up(x).relu())
        return self.ask(self, h, x, *others, *([] if memory is None else [memory]))


def same_tensor(model: Asking, h: Tensor, x: Tensor, *others: Tensor) -> Tensor:
    """Whether two arguments are one tensor."""
    return h * 2 if others[-1] is x else h + others[-1]


def recorded(model: Asking, h: Tensor, x: Tensor) -> Tensor:
    """Whether gradients are recorded."""
    return h * 2 if torch.is_grad_enabled() else h


def wanted(model: Asking, h: Tensor, x: Tensor) -> Tensor:
    """Whether a value, an argument or a weight wants a gradient."""
    return h * (1 + h.requires_grad) * (2 + x.requires_grad) * (4 + model.up.weight.requires_grad)


def named(model: Asking, h: Tensor, x: Tensor) -> dict[str, Any]:
    """Results by names with sizes in them."""
    return {f"{len(x)} rows": h, "shape": str(x.shape), "text": repr(x.shape[0])}


def kept(model: Asking, h: Tensor, x: Tensor) -> Tensor:
    """A size in what it keeps."""
    model.seen = {f"{x.size(0)} rows": 1}
    torch._assert(x.size(1) == 8, f"{x.size(1)} columns of {x.size(0)} rows")
    return h


def copied(model: Asking, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Results that are copies, of a value and of what is given."""
    first, second = torch.empty_like(h), x.new_empty(x.shape)
    first.copy_(h)
    second.copy_(x)
    return h, first, second.view(-1)


def typed(model: Asking, h: Tensor, x: Tensor) -> Tensor:
    """The default type."""
    return h.to(torch.get_default_dtype()) + torch.tensor(0.1)


def weighed(model: Asking, h: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """A weight that is an argument."""
    return h * weight.sum()


def doubly(model: Any) -> Tensor:
    """A call under another default type."""
    torch.set_default_dtype(torch.float64)
    try:
        return model(X)
    finally:
        torch.set_default_dtype(torch.float32)


def in_place(model: Any) -> list[Tensor]:
    """What is in results, and in the argument, after one of them was written."""
    x = X.clone()
    with torch.no_grad():
        results = model(x)
        results[1].add_(1)
        results[2].mul_(3)
    return [*results, x]


def frozen(model: Any) -> Tensor:
    """A call whose weights want no gradients."""
    model.requires_grad_(False)
    try:
        return model(X)
    finally:
        model.requires_grad_(True)


def without(model: Any) -> Any:
    """A call without gradients."""
    with torch.no_grad():
        return model(X)


def inferring(model: Any) -> Any:
    """A call in inference mode."""
    with torch.inference_mode():
        return model(X).clone()


def differentiated(model: Any) -> Any:
    """A call with an argument that wants a gradient, and the gradient."""
    x = X.clone().requires_grad_()
    result = model(x)
    return [result, *torch.autograd.grad(result.square().sum(), [x])]


def given_twice(model: Any) -> Any:
    """A call that is given a tensor twice, and its gradient."""
    x = X.clone().requires_grad_()
    result = model(x, x)
    return [result, *torch.autograd.grad(result.square().sum(), [x])]


CALLS: dict[Forward, list[Forward]] = {
    same_tensor: [
        lambda m: m(X, Y),
        lambda m: m(X, X),
        lambda m: m(X, X.clone()),
        lambda m: m(X, Y, memory=X),
        lambda m: m(X, X, memory=Y),
        given_twice,
    ],
    recorded: [without, lambda m: m(X), inferring, without],
    wanted: [lambda m: m(X), without, differentiated, inferring, frozen],
    named: [lambda m: m(X), lambda m: m(LONGER)],
    kept: [lambda m: (m(X), dict(m.seen)), lambda m: (m(LONGER), dict(m.seen))],
    copied: [lambda m: m(X), in_place],
    typed: [lambda m: m(X), doubly, lambda m: m(X)],
    weighed: [lambda m: m(X, m.up.weight), lambda m: m(X, m.down.weight[:2])],
}


def agrees(mine: Any, theirs: Any) -> bool:
    """Whether two results are equal, in all that a caller sees."""
    if isinstance(theirs, Tensor):
        alike = mine.dtype == theirs.dtype and mine.shape == theirs.shape
        return alike and torch.allclose(mine, theirs, atol=1e-5)
    if isinstance(theirs, dict):
        return list(mine) == list(theirs) and agrees(list(mine.values()), list(theirs.values()))
    if isinstance(theirs, list | tuple):
        return len(mine) == len(theirs) and all(map(agrees, mine, theirs))
    return bool(mine == theirs)


def asked() -> list[str]:
    """The calls whose results are not those of the unsharded model."""
    wrong = []
    for ask, calls in CALLS.items():
        torch.manual_seed(0)
        whole = Asking(ask)
        sharded = tpcompile.parallelize(copy.deepcopy(whole), mesh())
        wrong += [
            f"{ask.__name__} {i}" for i, call in enumerate(calls) if not agrees(call(sharded), call(whole))
        ]
    return wrong


def seeds(model: Asking, h: Tensor, x: Tensor) -> Tensor:
    """Draws the same numbers in every call."""
    torch.manual_seed(0)
    return functional.dropout(h)


def looks_back(model: Asking, h: Tensor, x: Tensor) -> Tensor:
    """Depends on whether there was a backward."""
    return h if model.up.weight.grad is None else h * 2


def begins(model: Asking, h: Tensor, x: Tensor) -> Tensor:
    """Depends on where an argument begins in its memory."""
    return h + x.storage_offset()


def lies(model: Asking, h: Tensor, x: Tensor) -> Tensor:
    """Depends on the order of an argument's elements in memory."""
    return h * 2 if x.is_contiguous() else h


def strides_through(model: Asking, h: Tensor, x: Tensor) -> Tensor:
    """Reads an argument by its memory."""
    return h + x.as_strided((2, 2), (1, 2)).sum()


def refused() -> list[str]:
    """What is said against models that ask for what a program cannot know."""
    state = torch.get_rng_state()
    said = [
        refusal(lambda ask=ask: tpcompile.parallelize(Asking(ask), mesh(), (X,)))
        for ask in (seeds, looks_back, begins)
    ]
    said.append(str(torch.equal(torch.get_rng_state(), state)))
    across = X.t().contiguous().t()
    for ask in (lies, strides_through):
        model = tpcompile.parallelize(Asking(ask), mesh(), (X,))
        said.append(refusal(lambda model=model: model(across)))  # type: ignore[misc]
        said.append(str(torch.equal(model(across.contiguous()), model(X))))
    said.append(refusal(lambda: tpcompile.parallelize(Asking(lies), mesh(), (across,))))
    return said


class Remembers(nn.Module):
    """Leaves what it has computed in a buffer, for the next call."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.up, self.down, self.in_place = nn.Linear(8, 16), nn.Linear(16, 8), in_place
        self.register_buffer("memory", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).relu()) + self.memory
        if self.in_place:
            self.memory.mul_(0.5).add_(y.mean(0))
        else:
            self.memory = self.memory / 2 + y.mean(0)
        return y


def remembered(in_place: bool) -> tuple[str, bool]:
    """What is said of a gradient that would go on into the call before; whether others are right."""
    torch.manual_seed(0)
    whole = Remembers(in_place)
    sharded = tpcompile.parallelize(copy.deepcopy(whole), mesh())
    found = []
    for model in (whole, sharded):
        with torch.no_grad():
            model(X)
        model(Y)
        model.memory.detach_()
        y = model(LONGER)
        y.square().sum().backward()
        found.append([y.detach(), model.up.weight.grad.norm(), model.memory.requires_grad])
    before = sharded.memory.clone()
    with torch.no_grad():
        sharded(X)
    right = agrees(found[1], found[0]) and not torch.equal(sharded.memory, before)
    sharded(Y)
    return refusal(sharded(Y).sum().backward) + refusal(sharded(Y[:1]).sum().backward), right


def compiled() -> list[str]:
    """The same under ``torch.compile``, for which programs are captured before."""
    wrong = []
    for ask in (same_tensor, recorded):
        torch.manual_seed(0)
        whole = Asking(ask)
        sharded = tpcompile.parallelize(copy.deepcopy(whole), mesh())
        run = torch.compile(sharded, backend="aot_eager")
        calls = CALLS[ask][:3]
        for call in calls:
            call(sharded)
        wrong += [f"{ask.__name__} {i}" for i, call in enumerate(calls) if not agrees(call(run), call(whole))]
    dist.barrier()
    return wrong

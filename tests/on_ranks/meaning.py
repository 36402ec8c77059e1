"""What the ranks do in ``test_meaning``: models whose python says more than their operators do."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import random
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import vmap
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.checkpoint import checkpoint

import tpcompile
from tests.helpers.toys import Mlp
from tests.on_ranks.models import error, mesh
from tests.on_ranks.module_life import X, _gradient_error, pair, refusal


class Round(torch.autograd.Function):
    """Straight through: elementwise both ways."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Scaled(torch.autograd.Function):
    """Its backward needs whole rows, and one of its results has no gradient."""

    @staticmethod
    def forward(x: Tensor, factor: float, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, int]:
        return x * factor, x > 0, 3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.factor, ctx.width = inputs[1], inputs[2][-1]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *rest: Any) -> tuple[Tensor, None, None]:
        return ctx.factor * grad.softmax(-1) * ctx.width, None, None


class OwnLinear(torch.autograd.Function):
    """A layer of its own, with weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return 2 * grad @ weight, 3 * torch.einsum("bsn,bsk->nk", grad, x)


class Layer(nn.Module):
    """One of many, each of which reverses the gradient by another factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.mlp, self.factor = Mlp(), factor

    def forward(self, x: Tensor) -> Tensor:
        return Scaled.apply(self.mlp(x), self.factor, (1, 2))[0]


class Functions(nn.Module):
    """All of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mlp(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first.up(x)
        y, positive, three = Scaled.apply(self.first.down(Round.apply(h * 4)), 0.5, x.shape)
        y = checkpoint(self.second, y * positive * three, use_reentrant=True)
        return OwnLinear.apply(y, self.second.up.weight)


def functions() -> dict[str, Any]:
    """Errors of results and gradients; what the plan says of functions that it leaves whole."""
    worst, said = 0.0, []
    for make in (Functions, lambda: nn.Sequential(*(Layer(0.1 * i) for i in range(6)))):
        whole, sharded, x = pair(make)
        for shape in (X, (2, 4, 12)):
            x = torch.randn(shape)
            ours, theirs = sharded(x), whole(x)
            (ours**3).sum().backward()
            (theirs**3).sum().backward()
            worst = max(worst, error(ours, theirs))
        worst = max(worst, _gradient_error(whole, sharded))
        said.append(sharded.plan.fallbacks)
    whole, sharded, x = pair(Functions, compile={"backend": "aot_eager"})
    ours, theirs = sharded(x), whole(x)
    ours.sum().backward()
    theirs.sum().backward()
    return {"worst": max(worst, error(ours, theirs), _gradient_error(whole, sharded)), "said": said}


def _hooked() -> nn.Module:
    """A model with backward hooks of all kinds on its parts, and what they see."""
    model = nn.Sequential(Mlp(), Mlp(), nn.LayerNorm(12))
    seen: list[float] = []

    def scale(part: nn.Module, into: Any, out: Any) -> Any:
        seen.append(float(out[0].norm()))
        return tuple(None if grad is None else 3 * grad for grad in into)

    def double(part: nn.Module, out: Any) -> Any:
        return (2 * out[0],)

    handles = [
        model[0].down.register_full_backward_hook(scale),
        model[1].up.register_full_backward_hook(scale),
    ]
    handles += [each.register_full_backward_pre_hook(double) for each in (model, model[1].down)]
    model.handles, model.seen = handles, seen
    return model


def hooks_before() -> float:
    """The worst error, with hooks that were there before the model was sharded, and once they are gone."""
    torch.manual_seed(0)
    whole = _hooked()
    torch.manual_seed(0)
    x = torch.randn(X)
    sharded = tpcompile.parallelize(_hooked().train(), mesh(), (x,))
    sharded.load_state_dict(whole.state_dict())
    worst = _forward_hooks()
    for _ in range(2):
        for each in (whole, sharded):
            (each(x) ** 3).sum().backward()
        worst = max(worst, _gradient_error(whole, sharded), error(tuple(sharded.seen), tuple(whole.seen)))
        for each in (whole, sharded):
            each.zero_grad()
            for handle in each.handles:
                handle.remove()
    return worst


def _forward_hooks() -> float:
    """The worst error with forward hooks that are removed, or are on all modules, before and after."""
    handles = []

    def hooked() -> nn.Module:
        model = nn.Sequential(Mlp(), Mlp())
        handles.append(model[0].register_forward_hook(lambda part, given, out: 2 * out))
        handles.append(model[1].up.register_forward_pre_hook(lambda part, given: (given[0] + 1,)))
        return model

    def tripled(part: nn.Module, *values: Any) -> Tensor | None:
        return 3 * values[-1] if isinstance(part, nn.Linear) else None

    def shifted(part: nn.Module, given: Any) -> Tensor | None:
        return given[0] + 1 if isinstance(part, Mlp) else None

    before = register_module_forward_hook(tripled)
    torch.manual_seed(0)
    whole = hooked()
    torch.manual_seed(0)
    sharded, x = tpcompile.parallelize(hooked(), mesh(), (torch.randn(X),)), torch.randn(X)
    worst = error(sharded(x), whole(x))
    before.remove()
    worst = max(worst, error(sharded(x), whole(x)))
    after = register_module_forward_pre_hook(shifted)
    worst = max(worst, error(sharded(x), whole(x)))
    after.remove()
    for handle in handles:
        handle.remove()
    return max(worst, error(sharded(x), whole(x)))


def twice() -> list[str]:
    """What is said of a second derivative, by inputs and by weights, and of several first ones at once; of
    hooks on all modules."""
    _, sharded, x = pair()
    x = x.requires_grad_()

    def penalty(of: list[Tensor]) -> Callable[[], None]:
        slopes = torch.autograd.grad((sharded(x) ** 3).sum(), of, create_graph=True)
        return sum((s**2).sum() for s in slopes).backward

    said = [refusal(penalty([x])), refusal(lambda: penalty(list(sharded.parameters()))())]
    said.append(refusal(lambda: sharded.first.up.register_backward_hook(lambda *_: None)))
    old = Mlp()
    old.up.register_backward_hook(lambda *_: None)
    said.append(refusal(lambda: tpcompile.parallelize(old, mesh(), (torch.randn(X),))))
    handle = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    try:
        said.append(refusal(lambda: sharded(x)))
    finally:
        handle.remove()
    loss = sharded(x).square().sum()
    loss.backward(create_graph=True)
    said.append(refusal(lambda: sharded.first.up.weight.grad))
    said.append(refusal(lambda: jacobian(sharded, x, vectorize=True)))
    y = sharded(x)
    grads = vmap(lambda v: torch.autograd.grad(y, x, v, retain_graph=True)[0])
    return [*said, refusal(lambda: grads(torch.ones(2, *y.shape)))]


GAIN = 2.0
LEVEL = ContextVar("LEVEL", default=1.0)
NUMBERS = itertools.count()


@dataclass(slots=True)
class Slotted:
    """What an object with slots can hold."""

    value: float = 2.0
    last: Any = None

    def times(self, x: Tensor) -> Tensor:
        """Is an attribute of a module, itself."""
        return x * self.value


@functools.lru_cache
def _table(size: int) -> Tensor:
    return torch.arange(float(size)) * GAIN


class Reading(nn.Module):
    """Reads state of every kind."""

    size = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        self._gain, self.scales, self.options = 2.0, {"a": [1.0, 2.0]}, SimpleNamespace(shift=0.5)
        self.heat, self.peeked, self.act = torch.tensor(2.0), torch.tensor(3.0), torch.relu
        self.slotted, self.times = Slotted(), Slotted().times
        self.power, self.hidden = functools.partial(lambda by, x: x * by[0], [1.0]), 1.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.mlp(x)) * self._gain * self.scales["a"][1] * GAIN * self.size
        y = self.power(self.times(y)) * self.slotted.value * vars(self)["hidden"] + _table(x.shape[-1])
        y = y * LEVEL.get() * float(os.environ.get("TEST_MEANING", "1"))
        return y / self.heat + self.options.shift * self.peeked.item() * getattr(self, "late", 1.0)


def _set_gain(model: Any) -> None:
    global GAIN
    GAIN = 3.0
    _table.cache_clear()


CHANGES: list[Callable[[Any], Any]] = [
    lambda m: setattr(m, "_gain", 5.0),
    lambda m: m.scales["a"].__setitem__(1, 7.0),
    lambda m: setattr(m.options, "shift", 0.25),
    lambda m: setattr(m, "heat", torch.tensor(4.0)),
    lambda m: m.heat.fill_(0.5),
    lambda m: setattr(m, "heat", torch.rand(12) + 1),
    lambda m: m.peeked.fill_(1.0),
    lambda m: setattr(m, "act", torch.tanh),
    lambda m: setattr(m, "late", 3.0),
    lambda m: m.__dict__.update(_gain=6.0),
    lambda m: setattr(Reading, "size", 2.0),
    _set_gain,
    lambda m: setattr(m.slotted, "value", 3.0),
    lambda m: setattr(m.times.__self__, "value", 3.0),
    lambda m: m.power.args[0].__setitem__(0, 2.0),
    lambda m: setattr(m, "hidden", 2.0),
    lambda m: LEVEL.set(2.0),
    lambda m: os.environ.update(TEST_MEANING="2"),
]


def read_state() -> tuple[list[float], int]:
    """Errors after changes of what forward reads; programs after a change that it does not read."""
    whole, sharded, x = pair(Reading)
    errors = []
    with torch.no_grad():
        for change in CHANGES:
            for each in (whole, sharded):
                torch.manual_seed(1)
                change(each)
            errors.append(error(sharded(x), whole(x)))
        before = len(sharded.programs)
        for i in range(3):
            sharded.step = i
            sharded(x)
    return errors, len(sharded.programs) - before


class Leaving(nn.Module):
    """Leaves values behind, of every kind that can be kept."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.state, self.ready, self.seen, self.lists = Mlp(), None, False, {}, []
        self.slotted = Slotted()

    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp.up(x) * (1 if self.ready else 2)
        self.state = h.tanh() if self.state is None else (h + self.state.detach()).tanh()
        self.ready, self.losses, self.rows = True, {"aux": [h.pow(2).mean()], "n": 3}, x.shape[0]
        self.seen["last"] = self.state.mean()
        self.lists.clear()
        self.lists.append(h.sum())
        self.slotted.last = h.mean()
        return self.mlp.down(self.state)


def left_state() -> tuple[float, int, list[str]]:
    """The worst error of results, of what is left behind, and of gradients through both; refusals."""
    torch.manual_seed(0)
    whole = Leaving()
    sharded = tpcompile.parallelize(copy.deepcopy(whole), mesh())
    worst = 0.0
    for _ in range(4):
        x = torch.randn(X)
        found = []
        for each in (sharded, whole):
            y = each(x)
            left = (each.losses["aux"][0], each.seen["last"], each.lists[0], each.slotted.last)
            (y.pow(3).sum() + sum(left)).backward()
            found.append(
                (y, each.state, *left, torch.tensor([each.ready, each.rows, each.losses["n"]]).float())
            )
        worst = max(worst, error(*map(tuple, found)))
    return max(worst, _gradient_error(whole, sharded)), len(sharded.programs), _refused_state()


COUNTED = {"calls": 0}


class Saying(nn.Module):
    """Does something before it computes."""

    def __init__(self, act: Callable[[Any], Any]) -> None:
        super().__init__()
        self.mlp, self.act, self.count = Mlp(), act, 0

    def forward(self, x: Tensor) -> Tensor:
        self.act(self)
        return self.mlp(x) * (1 + self.count)


def _count(model: Any) -> None:
    model.count += 1


def _default(model: Any, seen: list[int] = []) -> None:  # noqa: B006
    seen.append(1)


def _iterate(model: Any, steps: Any) -> None:
    next(steps)


def _refused_state() -> list[str]:
    x, calls = torch.randn(X), 0

    def enclosed(model: Any) -> None:
        nonlocal calls
        calls += 1

    acts: list[Callable[[Any], Any]] = [
        lambda m: COUNTED.update(calls=COUNTED["calls"] + 1),
        _default,
        enclosed,
        lambda m: m.register_buffer("made", torch.zeros(3)),
        lambda m: m.mlp.register_forward_hook(lambda *_: None),
        lambda m: setattr(m, "made", SimpleNamespace(x=x)),
        lambda m: next(NUMBERS),
        lambda m: os.environ.update({"TEST_MEANING_LEFT": "1"}),
        lambda m: random.random(),
        lambda m: np.random.rand(),
        functools.partial(_iterate, steps=iter(range(9))),
    ]
    said = [refusal(lambda act=act: tpcompile.plan(Saying(act), 2, (x,))) for act in acts]
    counting = tpcompile.parallelize(Saying(_count), mesh())
    return [*said, refusal(lambda: [counting(x) for _ in range(6)]), f"{COUNTED['calls']} {calls}"]


def replaced_forwards() -> tuple[float, list[str]]:
    """The worst error with forwards that were set on instances and classes, before and after; refusals."""

    class Own(Mlp):
        def __call__(self, x: Tensor) -> Any:
            return super().__call__(x) * 1.25

    class Outer(nn.Sequential):
        def __call__(self, x: Tensor) -> Any:
            return super().__call__(x) * 1.5

    def lifted() -> nn.Module:
        model = Outer(Own(), Own(), Own())
        before, part = model.forward, model[0].up.forward
        model.forward = lambda x: before(x) * 2
        model[0].up.forward = lambda x: part(x) * 3
        return model

    def wrap(model: Any, part: Any) -> None:
        before = part.forward
        part.forward = lambda x: before(x) * 0.5

    def own(part: Any, x: Tensor) -> Tensor:
        return x @ part.weight.t()

    changes: list[Callable[[Any], Any]] = [
        lambda m: None,
        lambda m: setattr(m[2].up, "forward", m[1].up.forward),
        lambda m: wrap(m, m[0].down),
        lambda m: setattr(m[1].up, "forward", MethodType(own, m[1].up)),
        lambda m: m[1].down.__dict__.update(forward=MethodType(own, m[1].down)),
        lambda m: setattr(Own, "forward", lambda self, x: self.down(self.up(x))),
        lambda m: wrap(m, m),
        lambda m: delattr(m[1].up, "forward"),
    ]
    torch.manual_seed(0)
    whole, x = lifted(), torch.randn(X)
    torch.manual_seed(0)  # a deep copy would call the other's parts
    sharded, worst = tpcompile.parallelize(lifted(), mesh(), (x,)), 0.0
    for change in changes:
        for each in (whole, sharded):
            each.zero_grad()
            change(each)
            each(x).pow(3).sum().backward()
        worst = max(
            worst,
            error(sharded[0](x), whole[0](x)),
            error(sharded(x), whole(x)),
            _gradient_error(whole, sharded),
        )
    said = [refusal(lambda: wrap(sharded, sharded[0].down))]
    said.append(refusal(lambda: setattr(sharded, "late", nn.Parameter(x))))
    return worst, said

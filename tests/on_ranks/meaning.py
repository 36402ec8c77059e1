"""What the ranks do in ``test_meaning``: models whose python says more than their operators do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
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
    worst = 0.0
    for _ in range(2):
        for each in (whole, sharded):
            (each(x) ** 3).sum().backward()
        worst = max(worst, _gradient_error(whole, sharded), error(tuple(sharded.seen), tuple(whole.seen)))
        for each in (whole, sharded):
            each.zero_grad()
            for handle in each.handles:
                handle.remove()
    return worst


def twice() -> list[str]:
    """What is said of a second derivative, by inputs and by weights; of hooks on all modules."""
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
        return [*said, refusal(lambda: sharded(x))]
    finally:
        handle.remove()

"""A captured program means what the model's python meant, or is refused: gradients, constants, state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook, saved_tensors_hooks

import tpcompile
from tests.helpers.run_ranks import run_spmd
from tests.helpers.toys import Mlp
from tests.on_ranks import meaning, questions
from tpcompile.capture.export.examine_function import is_elementwise
from tpcompile.errors import CannotCapture

F32 = 1e-5


def test_autograd_functions_keep_their_backward() -> None:
    for found in run_spmd(meaning.functions, 2, timeout=300):
        assert found["worst"] <= F32
        assert "Scaled does, forward and backward" in found["said"][0][0]
        assert not any("Round" in line for line in found["said"][0])


def test_hooks_that_are_there_before() -> None:
    assert max(run_spmd(meaning.hooks_before, 2)) <= F32


def test_second_derivatives_and_other_hooks_are_refused() -> None:
    for said in run_spmd(meaning.twice, 2):
        assert "second derivatives" in said[0]
        assert "second derivatives" in said[1]
        assert "register_full_backward_hook" in said[2]
        assert "register_full_backward_hook" in said[3]
        assert "hooks on all modules" in said[4]
        assert "second derivatives" in said[5]
        assert "several gradients at once" in said[6]
        assert "several gradients at once" in said[7]


def test_what_forward_reads_selects_the_program() -> None:
    for errors, more in run_spmd(meaning.read_state, 2, timeout=300):
        assert max(errors) <= F32, errors
        assert more == 0


def test_what_forward_asks_selects_the_program() -> None:
    assert run_spmd(questions.asked, 2, timeout=300) == [[], []]
    assert run_spmd(questions.compiled, 2, timeout=300) == [[], []]
    for seeding, looking, beginning, _, *lying in run_spmd(questions.refused, 2):
        assert "seeds torch's random numbers" in seeding
        assert "reads the gradient" in looking
        assert "where a tensor is in memory" in beginning
        assert lying[1] == lying[3] == "True"
        assert all("is not contiguous" in lying[at] for at in (0, 2, 4))


@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_end_with_the_call_that_left_a_value_in_a_buffer(in_place: bool) -> None:
    for said, right in run_spmd(questions.remembered, 2, in_place):
        assert right
        assert said.count("into the call before") == 2


def test_what_forward_leaves_is_left_behind() -> None:
    for worst, programs, said in run_spmd(meaning.left_state, 2, timeout=300):
        assert worst <= F32
        assert programs == 2  # before there was a state, and after
        expected = ["COUNTED", "a default of", "calls, a variable around", "made", "a hook behind"]
        expected += ["leaves a SimpleNamespace", "an iterator", "variable TEST_MEANING_LEFT"]
        expected += ["numbers of python", "numbers of numpy", "an iterator", "changes count"]
        for each, part in zip(said, expected, strict=False):
            assert part in each
        assert said[-1] == "0 0"


def test_forwards_that_are_replaced() -> None:
    for worst, said in run_spmd(meaning.replaced_forwards, 2, timeout=300):
        assert worst <= F32
        assert "replaced again" in said[0]
        assert "added" in said[1]


def _function(forward: Callable[..., Any], backward: Callable[..., Any]) -> Any:
    body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type("Function", (torch.autograd.Function,), body)


def _same(ctx: Any, grad: Tensor) -> Tensor:
    return grad


def _sine(ctx: Any, x: Tensor) -> Tensor:
    ctx.save_for_backward(x)
    return x.sin()


@pytest.mark.parametrize(
    ("elementwise", "forward", "backward"),
    [
        (True, _sine, _same),
        (True, _sine, lambda ctx, grad: torch.where(ctx.saved_tensors[0] > 0, grad, 0) + torch.tensor(2.0)),
        (True, lambda ctx, x: x.view_as(x), lambda ctx, grad: grad.clone().mul_(-0.5)),
        (False, lambda ctx, x: x.softmax(-1), _same),
        (False, lambda ctx, x: x / x.shape[-1] ** 0.5, _same),
        (False, lambda ctx, x: x if x.shape[-1] > 3 else -x, _same),
        (False, lambda ctx, x: x + torch.zeros(32), _same),
        (False, _sine, lambda ctx, grad: grad / grad.numel()),
        (False, _sine, lambda ctx, grad: grad.flip(-1)),
        (False, _sine, lambda ctx, grad: grad / grad.norm()),
    ],
)
def test_which_functions_are_elementwise(
    elementwise: bool, forward: Callable[..., Any], backward: Callable[..., Any]
) -> None:
    function, x = _function(forward, backward), torch.randn(4, 32, requires_grad=True)
    for each in (x, x.detach()):  # frozen, and trained later
        assert is_elementwise(lambda given, _: [function.apply(*given)], "it", [each]) is elementwise


class _Says(nn.Module):
    def __init__(self, act: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.mlp, self.act = Mlp(), act

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp.down(self.act(self, self.mlp.up(x)))


def _then(act: Callable[[Tensor], Any]) -> Callable[[nn.Module, Tensor], Tensor]:
    def acting(model: nn.Module, h: Tensor) -> Tensor:
        act(h)
        return h

    return acting


def _halved(model: nn.Module, h: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda t: t / 2, lambda t: t):
        return h**2


_RANDOM = _function(_sine, lambda ctx, grad: grad * torch.rand_like(grad))
_WRITING = _function(lambda ctx, x: x.mul_(2), _same)
_READING = _function(
    lambda ctx, x, layer: (setattr(ctx, "layer", layer), x * 2)[1],
    lambda ctx, grad: (grad * ctx.layer.weight.sum(), None),
)


@pytest.mark.parametrize(
    ("said", "act"),
    [
        ("registers a hook on a value", _then(lambda h: h.register_hook(lambda grad: 2 * grad))),
        ("grad_fn", _then(lambda h: h.grad_fn.register_hook(lambda *_: None))),
        ("grad_fn", _then(lambda h: register_multi_grad_hook((h,), lambda grads: None))),
        ("retain_grad", _then(lambda h: h.retain_grad())),
        ("runs backward", _then(lambda h: h.sum().backward())),
        ("takes a gradient", lambda m, h: torch.autograd.grad((h**3).sum(), h, create_graph=True)[0]),
        ("detach_", _then(lambda h: h.detach_())),
        ("assigns to a tensor's data", _then(lambda h: setattr(h, "data", h * 2))),
        ("requires_grad", lambda m, h: h.detach().requires_grad_()),
        ("saved_tensors_hooks", _halved),
        ("random numbers", lambda m, h: _RANDOM.apply(h)),
        ("writes into", lambda m, h: _WRITING.apply(h.clone())),
        ("a tensor that it is not given", lambda m, h: _READING.apply(h, m.mlp.down)),
    ],
)
def test_what_no_graph_says_is_refused(said: str, act: Callable[[nn.Module, Tensor], Tensor]) -> None:
    with pytest.raises(CannotCapture, match=said) as caught:
        tpcompile.plan(_Says(act), 2, (torch.randn(3, 12),))
    assert "test_meaning.py" in caught.value.where

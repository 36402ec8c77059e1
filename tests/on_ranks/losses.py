"""What test_losses runs on ranks: results that are gathered when they are used."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import tpcompile
from tests.on_ranks.models import error
from tests.on_ranks.module_life import refusal
from tpcompile.ranks.turns import own_turn
from tpcompile.runtime.sharded_result import ShardedResult
from tpcompile.weights.sharded_parameter import ShardedParameter


class _Square(torch.autograd.Function):
    """A function of the user's, which torch does not show to tensors before it runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Classifier(nn.Module):
    """Returns a loss, and the logits that it is of."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(12, 16), nn.Linear(16, classes)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        logits = self.head(self.inner(x).tanh())
        return None if labels is None else F.cross_entropy(logits, labels), logits


def train(llama: nn.Module, vocabulary: int) -> float:
    """A step of a sharded language model and of the same one unsharded: the largest difference."""
    ids = torch.randint(0, vocabulary, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(ids % 5 == 0, -100)
    whole = copy.deepcopy(llama).train()
    sharded = tpcompile.parallelize(llama.train())
    losses = []
    for model in (sharded, whole):
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(11)).loss
        losses.append(loss.detach())
        loss.backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    weights = sharded.full_state_dict()
    return max(error(*losses), *(error(weights[name], p) for name, p in whole.named_parameters()))


def use(classes: int) -> None:
    """Everything that is done with sharded logits is done with the whole ones, gradients included."""
    whole = Classifier(classes).double()
    sharded = tpcompile.parallelize(copy.deepcopy(whole), plan={"head": "colwise"})
    x, labels = (
        torch.randn(6, 12, dtype=torch.double, generator=torch.Generator().manual_seed(1)),
        torch.arange(6),
    )
    wanted, found = whole(x, labels)[1], sharded(x, labels)[1]
    assert type(found) is ShardedResult
    assert type(sharded(x)[1]) is Tensor
    # What is asked of it alone, on one rank, must not wait for the others.
    assert (found.shape, found.dtype, found.ndim, found.requires_grad) == (
        (6, classes),
        wanted.dtype,
        2,
        True,
    )
    assert "6x" in repr(found)
    assert found._whole is None
    uses = {
        "a sum": lambda t: t.sum(),
        "a slice": lambda t: t[1:, ::2].exp().mean(),
        "a function of the user's": lambda t: _Square.apply(t).sum(),
        "with others": lambda t: (torch.ones_like(t) + t).square().sum(),
        "a list": lambda t: torch.stack([t, t * 2]).square().sum(),
        "cast": lambda t: t.float().square().sum().double(),
    }
    for name, function in uses.items():
        found, wanted = (_gradients(model, x, labels, function) for model in (sharded, whole))
        errors = [error(found[name], wanted[name]) for name in wanted]
        assert max(errors) < 1e-6, (name, errors)
    _inspect(sharded, whole, x, labels)
    results = [sharded(x, labels)[1] for _ in "ab"]
    told = refusal(lambda: results[min(dist.get_rank(), 1)].sum())  # a part of each, if it were not refused
    assert "rank 0 is to gather result 1 of call" in told and ", rank 1 is to gather result 1 of call" in told


def _between_threads(logits: Tensor, group: str) -> None:
    """A thread that gathers beside a call of another one is told."""
    said = []
    with own_turn(group):
        thread = threading.Thread(target=lambda: said.append(refusal(lambda: logits + 0)))
        thread.start()
        thread.join()
    assert "another thread" in said[0]


def _gradients(
    model: nn.Module, x: Tensor, labels: Tensor, function: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    model.zero_grad()
    loss, logits = model(x, labels)
    (loss + function(logits)).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, ShardedParameter) else g for name, g in grads.items()}


def _inspect(sharded: nn.Module, whole: nn.Module, x: Tensor, labels: Tensor) -> None:
    """What is kept of logits, looked at, and refused."""
    (loss, logits), (_, wanted) = sharded(x, labels), whole(x, labels)
    assert torch.equal(logits.argmax(-1), wanted.argmax(-1))
    for copied in (copy.deepcopy(logits.detach()), logits.detach().cpu(), torch.tensor(logits.tolist())):
        torch.testing.assert_close(copied, wanted.detach().to(copied.dtype))
    torch.testing.assert_close(torch.from_numpy(logits.detach().numpy()), wanted.detach())
    file = io.BytesIO()
    torch.save(logits.detach(), file)
    logits = sharded(x, labels)[1]
    with torch.no_grad():
        logits[:, 0] = 7
    assert bool((logits[:, 0] == 7).all())
    loss, logits = sharded(x, labels)
    other, wanted = whole(x, labels)
    seen = []
    for tensor, result in ((logits, loss), (wanted, other)):
        tensor.retain_grad()
        tensor.register_hook(lambda grad: seen.append(grad.sum()))
        result.backward()
    assert len(seen) == 2
    torch.testing.assert_close(logits.grad + 0, wanted.grad)
    loss, logits = sharded(x, labels)
    with pytest.raises(tpcompile.TpCompileError, match="retain_grad"):
        torch.autograd.grad(loss, logits)
    with pytest.raises(tpcompile.TpCompileError, match="retain_grad"):
        loss.backward(inputs=[logits])
    with pytest.raises(tpcompile.TpCompileError, match="retain_grad"):
        torch.autograd.graph.register_multi_grad_hook([logits], lambda grads: None)
    logits.register_hook(lambda grad: grad * 2)
    with pytest.raises(tpcompile.TpCompileError, match="hook"):
        loss.backward()
    _between_threads(sharded(x, labels)[1], sharded._tp.group_name)
    with torch.no_grad():
        shown = sharded(x, labels)[1]
        assert torch.equal(torch.from_dlpack(torch.to_dlpack(shown)), shown + 0)
        torch.testing.assert_close(shown + 0, wanted.detach())

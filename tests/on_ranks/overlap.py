"""What the ranks do in ``test_overlap_gradients``: messages of gradients beside matmuls."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import tpcompile
from tests.on_ranks.models import error, mesh
from tpcompile.errors import TpCompileError

WIDE, INNER, LENGTH = 12, 10, 7
X = torch.randn(3, LENGTH, WIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """Two layers read the same normed value, with and without a bias; one of them is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDE)
        self.gate, self.up = nn.Linear(WIDE, INNER), nn.Linear(WIDE, INNER, bias=False)
        self.frozen = nn.Linear(WIDE, INNER).requires_grad_(False)
        self.down = nn.Linear(INNER, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        result: Tensor = x + self.down(torch.tanh(self.gate(y)) * self.up(y) + self.frozen(y))
        return result


class Model(nn.Module):
    """Two blocks: with a divided sequence, what the second one reads is gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.last = nn.LayerNorm(WIDE)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return F.silu(self.last(x))


class Order(TorchDispatchMode):
    """The collectives and matmuls that are issued, in their order, by a letter each.

    ``R`` all-reduce, ``S`` reduce-scatter, ``G`` all-gather, ``w`` the wait for one, ``m`` a matmul.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        letters = {
            "_c10d_functional::all_reduce": "R",
            "_c10d_functional::reduce_scatter_tensor": "S",
            "_c10d_functional::all_gather_into_tensor": "G",
            "_c10d_functional::wait_tensor": "w",
            "aten::mm": "m",
            "aten::addmm": "m",
        }
        self.seen += letters.get(func._schema.name, "")
        return func(*args, **(kwargs or {}))


def ways() -> dict[str, Any]:
    """Errors of results and gradients, the order of backward, and how much was kept of gathered sizes."""
    torch.manual_seed(0)
    start = Model().double()
    found = {}
    again = {"sequence_parallel": True, "checkpointing": "gathered"}
    options: dict[str, dict[str, Any]] = {
        "whole": {},
        "positions": {"sequence_parallel": True},
        "again": again,
        "again, compiled": {**again, "compile": {"backend": "aot_eager_decomp_partition"}},
    }
    for name, asked in options.items():
        whole = copy.deepcopy(start)
        sharded: Any = tpcompile.parallelize(copy.deepcopy(start), mesh(), (X,), **asked)
        kept: list[tuple[int, ...]] = []
        with saved_tensors_hooks(lambda t, kept=kept: kept.append(tuple(t.shape)) or t, lambda t: t):  # type: ignore[misc,func-returns-value]
            result = sharded(X)
        wanted = whole(X)
        wanted.square().sum().backward()
        with Order() as order:
            result.square().sum().backward()
        assert [p.grad is None for p in sharded.parameters()] == [p.grad is None for p in whole.parameters()]
        pairs = zip(sharded.parameters(), whole.parameters(), strict=True)
        errors = [error(p.grad.full_tensor(), q.grad) for p, q in pairs if q.grad is not None]
        found[name] = (
            error(result.detach(), wanted.detach()),
            max(errors),
            order.seen,
            kept.count((3, LENGTH, WIDE)),
            sharded.plan.recomputed,
        )
    found["twice"] = _differentiated_twice()
    found["nothing"] = _no_rows()
    return found


def _no_rows() -> tuple[tuple[int, ...], float]:
    """The shape of the gradient of an input without rows, and the sum of its weight's."""
    x, weight = X[:0].clone().requires_grad_(), torch.ones(2, WIDE, dtype=X.dtype, requires_grad=True)
    _, y = torch.ops.tpcompile.copy_linears(x, [weight], [None], mesh().get_group().group_name)
    of_x, of_weight = torch.autograd.grad(y.sum(), (x, weight))
    return tuple(of_x.shape), float(of_weight.abs().sum())


def _differentiated_twice() -> str:
    """What a second derivative says that goes through a message."""
    x, weight = X.clone().requires_grad_(), torch.ones(2, WIDE, dtype=X.dtype, requires_grad=True)
    group = mesh().get_group().group_name
    _, y = torch.ops.tpcompile.copy_linears(x, [weight], [None], group)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    try:
        grad.square().sum().backward()
    except TpCompileError as refusal:
        return str(refusal)
    return "nothing"

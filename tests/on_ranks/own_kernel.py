"""What the ranks do in ``test_compile_step``: an operator of one's own for a sum, a residual and a norm."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement
from torch.fx import Graph
from torch.nn import functional as F

import tpcompile
from tests.on_ranks.models import error, mesh

c10d = torch.ops._c10d_functional
WIDTH, EPS = 12, 1e-6


class Norm(nn.Module):
    """As in llama."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        y: Tensor = self.weight * wide.to(x.dtype)
        return y


class Layers(nn.Module):
    """Two MLPs, and a norm of the residual stream behind each."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 20, bias=False) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(20, WIDTH, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(Norm() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        for up, down, norm in zip(self.ups, self.downs, self.norms[1:], strict=True):
            x = x + down(F.silu(up(y)))
            y = norm(x)
        return y


def sum_add_norm(x: Tensor, residual: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """The pattern, and what a kernel for it gives: the residual stream, and its norm."""
    total = residual + c10d.wait_tensor(c10d.all_reduce(x, "sum", group))
    return total, weight * (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + EPS))


def use_kernel(graph: Graph) -> None:
    """A pass of Inductor's that puts the kernel where the pattern is."""
    (group,) = {n.args[2] for n in graph.find_nodes(op="call_function", target=c10d.all_reduce.default)}
    patterns = PatternMatcherPass()
    register_replacement(
        lambda x, residual, weight: sum_add_norm(x, residual, weight, group),
        lambda x, residual, weight: torch.ops.tests_own.sum_add_norm(x, residual, weight, group),
        [torch.empty(2, 8, WIDTH), torch.empty(2, 8, WIDTH), torch.empty(WIDTH)],
        fwd_only,
        patterns,
    )
    patterns.apply(graph)


def taken() -> tuple[float, int]:
    """The error, and how often the kernel has run, in two calls of other sizes."""
    ran = 0

    def kernel(*args: Any) -> tuple[Tensor, Tensor]:
        nonlocal ran
        ran += 1
        return sum_add_norm(*args)

    def shapes(x: Tensor, residual: Tensor, weight: Tensor, group: str) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(x)

    torch.manual_seed(0)
    whole, worst = Layers(), 0.0
    with torch.library._scoped_library("tests_own", "FRAGMENT") as library, torch.no_grad():
        library.define(
            "sum_add_norm(Tensor x, Tensor residual, Tensor weight, str group) -> (Tensor, Tensor)"
        )
        library.impl("sum_add_norm", kernel, "CPU")
        library.impl("sum_add_norm", shapes, "Meta")
        options: Any = {"post_grad_custom_pre_pass": use_kernel}
        example = torch.randn(2, 8, WIDTH)
        sharded = tpcompile.parallelize(copy.deepcopy(whole), mesh(), (example,), compile=options)
        for x in (example, torch.randn(3, 5, WIDTH)):
            worst = max(worst, error(sharded(x), whole(x)))
    return worst, ran

"""Functions of autograd however they are called: their backward is kept, or the call is refused."""

from __future__ import annotations

from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.autograd import Function

from tpcompile.capture.export.capture_model import capture
from tpcompile.capture.export.kept_calls import FUNCTION
from tpcompile.errors import CannotCapture
from tpcompile.ir.calls import bind_call


class Reverse(Function):
    """Hands on what it is given, and its gradient turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


reverse = Reverse.apply


class Direct(nn.Linear):
    """Calls it as its class's."""

    def forward(self, x: Tensor) -> Tensor:
        made = type("Defined", (Reverse,), {})  # while it is traced
        return made.apply(Reverse.apply(super().forward(x)))


class Kept(nn.Linear):
    """Calls it under another name."""

    def forward(self, x: Tensor) -> Tensor:
        return reverse(super().forward(x))


def calls(model: nn.Module) -> int:
    captured = capture(model, bind_call(model, (torch.randn(3, 4),), {}))
    return len(captured.graph_module.graph.find_nodes(op="call_function", target=FUNCTION))


def test_its_classs_own() -> None:
    assert calls(Direct(4, 4)) == 2
    x = torch.ones(2, requires_grad=True)
    reverse(x).sum().backward()  # and nothing is left behind
    assert x.grad is not None and x.grad.tolist() == [-1, -1]


def test_kept_under_another_name() -> None:
    """From torch 2.14 on that is C, which a trace would go through."""
    try:
        assert calls(Kept(4, 4)) == 1
    except CannotCapture as error:
        assert "kept under another name" in str(error)
        assert Version(torch.__version__) >= Version("2.14")

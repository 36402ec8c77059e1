"""Has torch 2.11 ask sharded parameters what an operator does to them.

Its C++ takes whatever is derived from ``DTensor`` for one, and never calls its ``__torch_dispatch__``: parts
of packed or uneven weights would be computed with as if the placements said all. A dispatch mode comes before
that, so one is on in every function of torch that is given a sharded parameter, and in backward once autograd
has recorded such a function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tpcompile.ir.torch_internals import TorchDispatchMode, disabled_torch_function_impl, tree_leaves

ASKED = torch.__version__ >= "2.12"
"""Whether torch asks by itself."""


class AskingMode(TorchDispatchMode):
    """Operators with operands of one class are those of the class.

    Attributes:
        recorded: whether autograd has recorded one of them.
    """

    recorded = False

    def __init__(self, kind: type, dispatch: Callable[..., Any]) -> None:
        super().__init__()
        self.kind, self.dispatch = kind, dispatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(x, self.kind) for x in tree_leaves((args, kwargs))):
            return self.dispatch(self.kind, func, args, kwargs)
        return func(*args, **kwargs)


def ask_by_mode(kind: Any, dispatch: Callable[..., Any]) -> None:
    """Has a class of tensors asked by a mode.

    Args:
        kind: the class: it gets a ``__torch_function__``.
        dispatch: what an operator does: it takes the class, the operator, its arguments, and those by name.
    """

    def asks(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with AskingMode(kind, dispatch):
            result = disabled_torch_function_impl(func, types, args, kwargs or {})
        if any(isinstance(x, Tensor) and x.grad_fn is not None for x in tree_leaves(result)):
            AskingMode.recorded = True
        return result

    def runs(*args: Any, **kwargs: Any) -> Any:
        if not AskingMode.recorded:
            return engine(*args, **kwargs)
        with AskingMode(kind, dispatch):
            return engine(*args, **kwargs)

    autograd: Any = torch.autograd
    engine, autograd._engine_run_backward = autograd._engine_run_backward, runs
    kind.__torch_function__ = classmethod(asks)

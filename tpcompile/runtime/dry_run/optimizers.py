"""The optimizer of an estimated step of training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tpcompile.errors import TpCompileError
from tpcompile.ir.check import short
from tpcompile.weights.optimizer_updates import ELEMENTWISE

from .run_step import Optimizer

_NAMES: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}),
    "adam": (torch.optim.Adam, {}),
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adagrad": (torch.optim.Adagrad, {}),
}


def read_optimizer(optimizer: str | Callable[..., Any], accelerator: bool) -> Optimizer:
    """What makes an optimizer for some parameters.

    Args:
        optimizer: a name, or a function of a list of parameters.
        accelerator: a named one updates all parameters at once, as torch's do there.

    Raises:
        TpCompileError: there is no such name; or (the function) what is made looks at more than elements.
    """
    if isinstance(optimizer, str) and optimizer not in _NAMES:
        raise TpCompileError(
            f"no optimizer is named {short(optimizer)}",
            where="optimizer",
            todo=f"give one of {', '.join(_NAMES)}, or a function of a list of parameters",
        )

    def make(params: list[Tensor]) -> torch.optim.Optimizer:
        if isinstance(optimizer, str):
            kind, options = _NAMES[optimizer]
            made: torch.optim.Optimizer = kind(params, foreach=accelerator, **options)
            return made
        return _elementwise(optimizer(params))

    return make


def _elementwise(made: Any) -> torch.optim.Optimizer:
    known = {f"torch.optim.{name}" for name in (*ELEMENTWISE, "adamw")}
    if not isinstance(made, torch.optim.Optimizer) or type(made).__module__ not in known:
        raise TpCompileError(
            f"the update of a {type(made).__name__} looks at more than single elements of a weight",
            where="optimizer",
            todo="estimate with one of torch's optimizers that does not: AdamW, SGD, ...",
        )
    return made

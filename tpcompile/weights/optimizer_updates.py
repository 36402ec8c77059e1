"""Updates of torch's elementwise optimizers: they are done on the parts, as if those were all there is.

An optimizer holds sharded parameters, and so do its states: what it saves is right. Only the function that
does the arithmetic is given plain tensors, once per step: an update goes through a dozen lists of tensors,
and would else unwrap and wrap each of them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .sharded_parameter import ShardedParameter
from .tensor_layout import TensorLayout

ELEMENTWISE = (
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "asgd",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
)
"""torch's functions that treat every element by itself, in each of their implementations."""

Update = Callable[..., None]
"""Takes parameters, gradients, states as lists, and options; writes what it is given."""


def tell_optimizers() -> None:
    """Replaces the functions that torch's optimizers call."""
    for name in ELEMENTWISE:
        module = importlib.import_module(f"torch.optim.{name}")
        setattr(module, name, _on_parts(getattr(module, name)))


def _on_parts(update: Update) -> Update:
    """The same function, for lists of sharded parameters as well."""

    @functools.wraps(update)
    def run(params: list[Tensor], grads: list[Tensor], *states: Any, **options: Any) -> None:
        lists = [params, grads, *states]
        parts: list[Any] = []
        if not torch.compiler.is_compiling() and any(type(p) is ShardedParameter for p in params):
            wheres = [p.placing if type(p) is ShardedParameter else None for p in params]
            parts = [_parts(each, wheres) for each in lists]
        if not parts or options.get("differentiable") or any(each is None for each in parts):
            return update(params, grads, *states, **options)
        before = parts[1][0]._version
        update(*parts, **options)
        for given, part in zip(lists, parts, strict=True):
            if given is not grads or part[0]._version != before:
                _note_written(given, part, wheres)
        return None

    return run


def _parts(values: Any, wheres: list[TensorLayout | None]) -> Any:
    """The parts of what is in a list; None if one is laid out in another way than the parameter."""
    if not isinstance(values, list) or len(values) != len(wheres):
        return values
    parts: list[Tensor | None] = []
    for value, where in zip(values, wheres, strict=True):
        if type(value) is ShardedParameter:
            if value.placing is not where and value.placing != where:
                return None
            value = value._local_tensor
        elif where is not None and value is not None and value.ndim:
            return None
        parts.append(value)
    return parts


def _note_written(given: Any, parts: Any, wheres: list[TensorLayout | None]) -> None:
    """What autograd has saved of a list is out of date; new states become sharded ones."""
    if given is parts:
        return
    increment_version([t for t in given if type(t) is ShardedParameter])
    for at, where in enumerate(wheres):
        if given[at] is not parts[at] and given[at] is None:
            given[at] = parts[at] if where is None else ShardedParameter(parts[at], where)

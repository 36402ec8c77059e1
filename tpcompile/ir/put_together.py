"""Quantised weights as they were, while a model's python runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import nn

from .unwrap import APART, ORIGINAL, Wrapping, refill


@contextmanager
def put_together(model: nn.Module) -> Iterator[None]:
    """Lends a model its quantised weights as they were, and its modules their classes, while its python runs.

    Python may ask for both: for the class of a module, or for the names of its parameters.
    """
    undo: list[Callable[[], Any]] = []
    try:
        for module in model.modules():
            apart: dict[str, Wrapping] = module.__dict__.get(APART, {})
            for name, wrapping in apart.items():
                _lend(module, name, wrapping, undo)
            kind: Any = type(module)
            if apart and ORIGINAL in vars(kind):
                undo.append(functools.partial(setattr, module, "__class__", kind))
                module.__class__ = vars(kind)[ORIGINAL]
        yield
    finally:
        for act in reversed(undo):
            act()


def _lend(module: nn.Module, name: str, wrapping: Wrapping, undo: list[Callable[[], Any]]) -> None:
    """Puts a weight in the place of its parts."""
    parts, tables = set(wrapping.leaves()), [module._parameters, module._buffers]
    for table in cast(list[Any], tables):
        if not parts <= table.keys():  # or it is there already: an exported module has several faces
            continue
        whole = wrapping.whole(module)
        whole._is_param = table is module._parameters
        before: dict[str, Any] = dict(table)
        lent: dict[str, Any] = {}
        for key, tensor in before.items():
            lent |= {name: whole} if key in parts else {key: tensor}
        undo.append(functools.partial(refill, table, before))
        refill(table, lent)

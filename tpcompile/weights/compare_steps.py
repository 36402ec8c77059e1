"""Whether ranks take the steps of their optimizers together, and alike: an update sends nothing by itself.

A rank that steps alone, or at another learning rate, would go on with weights that are not those of the
others. Comparing costs a message, so it is done at the first, second, fourth, eighth ... step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch

from tpcompile.ir.torch_internals import current_autograd_node
from tpcompile.ranks.agree import compare
from tpcompile.ranks.describe import describe_value

from .sharded_parameter import ShardedParameter

_STEPS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
"""How many steps every optimizer has taken."""


def compare_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    """What torch calls before every step of an optimizer.

    A step in backward is not compared: ranks may be at other places of it.

    Raises:
        TpCompileError: ranks have other optimizers, parameters or settings, or one makes another call.
    """
    if torch.compiler.is_compiling() or current_autograd_node() is not None:
        return
    count = _STEPS[optimizer] = _STEPS.get(optimizer, 0) + 1
    if count & (count - 1):
        return
    sharded = (p for group in optimizer.param_groups for p in group["params"] if type(p) is ShardedParameter)
    divided = next((p for p in sharded if not p.placing.whole), None)
    if divided is not None:
        todo = "step with the same optimizer, and the same settings, on every rank"
        compare(divided.placing.group, "steps of an optimizer", list(_lines(optimizer, count)), todo)


def _lines(optimizer: Any, count: int) -> Iterator[str]:
    yield f"step {count} of {type(optimizer).__qualname__}"
    for group in optimizer.param_groups:
        for p in group["params"]:
            place = p.placing.name if type(p) is ShardedParameter else "plain"
            yield place
        yield from (f"{name}: {describe_value(value)}" for name, value in group.items() if name != "params")

"""The parameters that sharded ones have replaced, which somebody else may hold.

A module outside of the model, to which a weight was tied, or an optimizer that was made before: each would go
on with a parameter that the model does not have any more. So the old one says so when it is used.
"""

from __future__ import annotations

from typing import Any, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor, nn

from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import DisableTorchFunctionSubclass, pytree

from .sharded_parameter import ShardedParameter

_REPLACED = "_tp_replaced"
"""The attribute of a replaced parameter: its name, the sharded one's leaf, and that one's version then."""

_FACTS = (bool, int, str, type(None), torch.Size, torch.dtype, torch.device, torch.layout)
"""What may be asked of a tensor whose values are out of date."""

_CHECKED: WeakSet[Any] = WeakSet()
"""The optimizers that have no replaced parameters."""


class ReplacedParameter(nn.Parameter):
    """What a parameter is once a sharded one has replaced it: to be read as long as both are the same."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operation, unless it tells the two parameters apart.

        Raises:
            TpCompileError: it is recorded for gradients, writes, or reads values that are out of date.
        """
        held = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, cls)]
        with DisableTorchFunctionSubclass():
            versions = [p._version for p in held]
            found = func(*args, **(kwargs or {}))
            results = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
            recorded = any(result.grad_fn is not None for result in results)
            for p, version in zip(held, versions, strict=True):
                _, leaf, then = p.__dict__[_REPLACED]
                outdated = leaf._version != then and not isinstance(found, _FACTS)
                if recorded or outdated or p._version != version:
                    p._refuse()
        return found

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TpCompileError(
            "this weight was shared with a model that is sharded now, and would not change with its weights",
            where=self.__dict__[_REPLACED][0],
            todo="parallelize the module that holds all that share the weight, or share it again: "
            "outside.weight = model.get_parameter(name)",
        )


def note_replaced(name: str, old: nn.Parameter, new: ShardedParameter) -> None:
    """Notes that a sharded parameter has replaced another one."""
    leaf = new._local_tensor
    if type(old) is nn.Parameter and not (old.is_inference() or leaf.is_inference()):
        old.__dict__[_REPLACED] = (name, leaf, leaf._version)
        old.__class__ = ReplacedParameter
    _CHECKED.clear()


def refuse_replaced(params: Any, what: str, todo: str) -> None:
    """Refuses parameters that sharded ones have replaced.

    Raises:
        TpCompileError: there are some; the first is named.
    """
    for param in params:
        if isinstance(param, ReplacedParameter):
            raise TpCompileError(what, where=param.__dict__[_REPLACED][0], todo=todo)


def check_optimizer(optimizer: Any, args: Any, kwargs: Any) -> None:
    """Refuses the step of an optimizer that was made before ``parallelize``: it would change nothing."""
    if optimizer in _CHECKED:
        return
    refuse_replaced(
        (p for group in optimizer.param_groups for p in group["params"]),
        "the optimizer has the weights that the model had before it was sharded",
        "make the optimizer after parallelize",
    )
    _CHECKED.add(optimizer)

"""The tables of a sharded model's modules: weights may take other values, nothing is added or removed."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import stateless

from tpcompile.errors import TpCompileError
from tpcompile.ir.module_tensors import every_name
from tpcompile.ir.torch_internals import FakeTensor, FunctionalTensor
from tpcompile.weights.sharded_parameter import ShardedParameter

from .watched_module import TABLES, WatchedModule


class FixedTable(dict[str, Any]):
    """One of a module's tables: its parts, parameters or buffers. Weights can take each other's place.

    Much of torch writes to them (``ModuleList.insert``, pruning, ``weight_norm``), some of it before it calls
    a method of the module that could refuse.

    Args:
        module: the module, of a sharded model.
        table: what it has.
    """

    def __init__(self, module: nn.Module, table: dict[str, Any]) -> None:
        super().__init__(table)
        self._module = weakref.ref(module)

    def __setitem__(self, name: str, value: Any) -> None:
        old = self.get(name)
        if isinstance(old, ShardedParameter) and isinstance(value, Tensor) and value is not old:
            self._lend(name, old, value)
        elif value is not old and not (isinstance(value, Tensor) and isinstance(old, Tensor)):
            self._change(name)
        super().__setitem__(name, value)

    def __delitem__(self, name: str) -> None:
        self._change(name)
        super().__delitem__(name)

    def pop(self, name: str, *default: Any) -> Any:
        """As of a dict, if it may change."""
        self._change(name)
        return super().pop(name, *default)

    def clear(self) -> None:
        """As of a dict, if it may change."""
        self._change("all")
        super().clear()

    def popitem(self) -> tuple[str, Any]:
        """As of a dict, if it may change."""
        self._change("all")
        return super().popitem()

    def setdefault(self, name: str, default: Any = None) -> Any:
        """As of a dict, if it may change."""
        if name not in self:
            self[name] = default
        return self[name]

    def __ior__(self, other: Any) -> Self:  # type: ignore[override,misc]
        self.update(other)
        return self

    def update(self, *others: Any, **more: Any) -> None:
        """As of a dict, if it may change."""
        for name, value in dict(*others, **more).items():
            self[name] = value

    def __reduce_ex__(self, protocol: Any) -> Any:  # a copy is that of another module
        return dict, (dict(self),)

    def _lend(self, name: str, old: ShardedParameter, value: Tensor) -> None:
        """Notes what takes the place of a weight (``functional_call``).

        The leaf inside of a weight, tensors without values, and what is loaded in place of one without are
        what our own code puts there.

        Raises:
            TpCompileError: it is a plain tensor, of which programs would take the whole for a part.
        """
        module = self._module()
        place = module._place() if isinstance(module, WatchedModule) else None
        if (
            place is None
            or value is old._local_tensor
            or old._local_tensor.is_meta
            or value.is_meta
            or isinstance(value, (FakeTensor, FunctionalTensor))
        ):
            return
        if not isinstance(value, DTensor):
            raise TpCompileError(
                "a plain tensor is put where a sharded weight was, behind its module's back",
                where=old.placing.name,
                todo="assign it as an attribute of the module, or use torch.func.functional_call",
            )
        lent, key = place[0].lent, (id(self), name)
        if lent.setdefault(key, id(old)) == id(value):
            del lent[key]

    def _change(self, name: str) -> None:
        """Refuses changes, but for what the code of the model does while it is captured or runs as python."""
        module = self._module()
        place = module._place() if isinstance(module, WatchedModule) else None
        if isinstance(module, WatchedModule) and place is not None and not place[0].running:
            module._refuse_change(name)


def fix_tables(module: nn.Module) -> None:
    """Lets a module keep its parts and weights."""
    for name in ("_modules", *TABLES):
        module.__dict__[name] = FixedTable(module, module.__dict__[name])


@functools.cache
def tell_functional_call() -> None:
    """Lets ``functional_call`` of a sharded model take whole tensors; compiled code runs it as python."""
    torch_: Any = stateless
    original = stateless._functional_call
    as_python: Callable[..., Any] = torch.compiler.disable(functools.partial(_functional_call, original))

    @functools.wraps(original)
    def call(module: nn.Module, given: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(part, WatchedModule) for part in module.modules()):
            return as_python(module, given, *args, **kwargs)
        return original(module, given, *args, **kwargs)

    torch_._functional_call = call


def _functional_call(
    original: Any, module: nn.Module, given: dict[str, Tensor], *args: Any, **kwargs: Any
) -> Any:
    _decide_weights(module, *args, **kwargs)
    held = dict(every_name(module))
    taken = dict(given)
    for name, value in given.items():
        weight = held.get(name)
        if not isinstance(weight, ShardedParameter):
            continue
        if isinstance(value, ShardedParameter) and value.placing != weight.placing:
            value = value.full_tensor()
        if not isinstance(value, DTensor):
            taken[name] = weight.from_whole(value)
    parts = {name: value for name, value in taken.items() if value is not given[name]}
    result = original(module, taken, *args, **kwargs)
    given.update({name: value for name, value in taken.items() if name not in parts})  # written buffers
    return result


def _decide_weights(module: Any, args: Any = (), kwargs: Any = None, **options: Any) -> None:
    """Has a model say how its weights are divided before others, divided alike, stand for them."""
    if "_tp" in module.__dict__ and module._tp.layout is None:
        module.capture(*(args if isinstance(args, tuple) else (args,)), **(kwargs or {}))

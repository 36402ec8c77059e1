"""Tells PEFT of sharded models, when it is imported: they may get adapters like any other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from tpcompile.ir.when_imported import when_imported
from tpcompile.weights.saving.adapters import tell_peft

from .take_again import take_again
from .watched_module import root_of

_WHAT = "change the adapters"


@functools.cache
def tell_of_adapters() -> None:
    """Lets PEFT's functions that put adapters into a model take a sharded one, which is taken again."""
    for name in ("peft.peft_model", "peft.mixed_model", "peft.tuners.tuners_utils"):
        when_imported(name, _tell)


def _tell(module: ModuleType) -> None:
    for kind in list(vars(module).values()):
        if not (
            isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__ == module.__name__
        ):
            continue
        own, changed = vars(kind), {}
        if "__init__" in own and hasattr(kind, "add_adapter"):  # a model of PEFT, not a tuner in it
            changed["__init__"] = _made_around(own["__init__"])
        for name in own.keys() & {"add_adapter", "inject_adapter", "delete_adapter"}:
            changed[name] = _inside(own[name])
        for name, method in changed.items():
            setattr(kind, name, method)


def _made_around(init: Callable[..., None]) -> Callable[..., None]:
    """Has a model of PEFT become the sharded model, instead of the one that it is made around."""

    @functools.wraps(init)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        model = args[0] if args else kwargs.get("model")
        if not isinstance(model, nn.Module) or "_tp" not in model.__dict__:
            return init(self, *args, **kwargs)
        tell_peft()
        take_again(model, _WHAT, lambda: init(self, *args, **kwargs), around=self)

    return run


def _inside(method: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a method change the layers of the sharded model that it is of, or that it is given."""

    @functools.wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = [root_of(each) for each in (self, *args, *kwargs.values()) if isinstance(each, nn.Module)]
        model = next((each for each in found if each is not None), None)
        if model is None:
            return method(self, *args, **kwargs)
        tell_peft()
        return take_again(model, _WHAT, lambda: method(self, *args, **kwargs))

    return run

"""Tells transformers' ``Trainer`` of sharded models, when it is imported: most processes never do."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_TRAINER = "transformers.trainer"


@functools.cache
def tell_trainer() -> None:
    """Lets every ``Trainer`` that is made from now on know a sharded model when it is given one."""
    if _TRAINER in sys.modules:
        _tell(sys.modules[_TRAINER])
    else:
        sys.meta_path.insert(0, _WhenImported(_TRAINER, _tell))


def _tell(module: ModuleType) -> None:
    trainer: Any = module.Trainer
    # The one knows the model that it is given, the other the one that ``model_init`` makes.
    for name in ("create_accelerator_and_postprocess", "call_model_init"):
        setattr(trainer, name, _then_share(getattr(trainer, name)))


def _then_share(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        from .trainer import share_model  # imports transformers' trainer

        share_model(self, self.model if result is None else result)
        return result

    return run


class _WhenImported(MetaPathFinder):
    """Does something with a module as soon as it is imported, once."""

    def __init__(self, name: str, do: Callable[[ModuleType], None]) -> None:
        self.name, self.do = name, do

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own, whose loader does it afterwards."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.do(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

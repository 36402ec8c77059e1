"""Tells transformers' ``Trainer`` of sharded models, when it is imported: most processes never do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from tpcompile.ir.when_imported import when_imported


@functools.cache
def tell_trainer() -> None:
    """Lets every ``Trainer`` that is made from now on know a sharded model when it is given one."""
    when_imported("transformers.trainer", _tell)


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

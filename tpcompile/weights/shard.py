"""The original module as the shell of the sharded one: its class, its weights, its names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tpcompile.ir.layout.weight_layout import WeightLayout
from tpcompile.ir.module_tensors import replace_tensors, tensors_by_name
from tpcompile.strategies.custom.custom_modules import CustomModules

from .gather import is_whole


def shard_more_weights(model: nn.Module, layout: WeightLayout, rank: int, names: Iterable[str]) -> None:
    """Cuts parameters that stayed whole so far, in place: nothing was computed with them yet."""
    places = tensors_by_name(model)
    for name in names:
        if not is_whole(layout.params[name]):
            module, attribute = places[name]
            param = getattr(module, attribute)
            param.data = layout.shard(name, param.detach(), rank)


def shard_weights(model: nn.Module, layout: WeightLayout, rank: int, custom: CustomModules) -> None:
    """Replaces every divided parameter by this rank's slice, one at a time: the whole is freed at once.

    What only a custom strategy can cut, it cuts.
    """
    for name, (module, attribute) in tensors_by_name(model).items():
        if is_whole(layout.params[name]):
            continue
        whole = getattr(module, attribute)
        local = cut(name, whole.detach(), layout, rank, custom)
        if isinstance(whole, nn.Parameter):
            local = nn.Parameter(local, requires_grad=whole.requires_grad)
        replace_tensors(model, {id(whole): local})
        del whole


def cut(name: str, whole: Tensor, layout: WeightLayout, rank: int, custom: CustomModules) -> Tensor:
    """A rank's slice of a whole parameter."""
    selection = layout.params[name].selection
    if selection is not None and selection.runs is None:
        return custom.local_part(name, whole, rank)
    return layout.shard(name, whole, rank)


@contextmanager
def unsharded(model: nn.Module, original: type[nn.Module], layout: WeightLayout | None) -> Iterator[None]:
    """Lends the model its original class and whole (valueless) weights, so that it can be captured again."""
    if layout is None:
        sharded_class = model.__class__
        model.__class__ = original
        try:
            yield
        finally:
            model.__class__ = sharded_class
        return
    sharded_class = model.__class__
    lent: dict[int, Tensor] = {}
    back: dict[int, Tensor] = {}
    for name, (module, attribute) in tensors_by_name(model).items():
        local = getattr(module, attribute)
        if tuple(local.shape) != layout.params[name].shape:
            whole: Tensor = torch.empty(layout.params[name].shape, dtype=local.dtype, device="meta")
            if isinstance(local, nn.Parameter):
                whole = nn.Parameter(whole, requires_grad=local.requires_grad)
            lent[id(local)], back[id(whole)] = whole, local
    replace_tensors(model, lent)
    model.__class__ = original
    try:
        yield
    finally:
        model.__class__ = sharded_class
        replace_tensors(model, back)


def sharded_class(original: type[nn.Module], base: type) -> type[nn.Module]:
    """A subclass of the model's class whose forward runs programs; its name and signature are kept."""

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._tp.call(self, args, kwargs)

    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    body = {"forward": forward, "__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (base, original), body)

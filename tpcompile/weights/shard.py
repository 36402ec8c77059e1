"""The original module as the shell of the sharded one: its class, its weights, its names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from tpcompile.errors import TpCompileError
from tpcompile.ir.module_tensors import replace_tensors, tensors_by_name

from .replaced import note_replaced
from .sharded_parameter import ShardedParameter, local_tensor
from .sharded_weights import ShardedWeights
from .tensor_layout import TensorLayout
from .torch_guards import guard_torch


def shard_weights(model: nn.Module, weights: ShardedWeights, names: Container[str] | None = None) -> None:
    """Gives every parameter its layout and this rank its part, one at a time: the whole is freed at once.

    Parameters become ``ShardedParameter``s, those that stay whole too; buffers only if they are divided. What
    is a ``ShardedParameter`` already, and whole, is divided in place.

    Args:
        model: the model.
        weights: where its weights are to be.
        names: those to look at; by default all.

    Raises:
        TpCompileError: FSDP or DDP has a parameter that is to be divided now; nothing was changed.
    """
    guard_torch()
    wanted = weights.layout.params if names is None else names
    places = {name: place for name, place in tensors_by_name(model).items() if name in wanted}
    for name, place in places.items():
        _refuse_divided(getattr(*place), weights.of(name))
    for name, (module, attribute) in places.items():
        tensor, where = getattr(module, attribute), weights.of(name)
        if isinstance(tensor, ShardedParameter):
            if not where.whole:
                tensor.lay_out(where)
        elif isinstance(tensor, nn.Parameter) and not isinstance(tensor, DTensor):
            new = ShardedParameter.parameter(where.cut(tensor.detach()), where, tensor.requires_grad)
            new.grad = tensor.grad
            _carry_hooks(tensor, new)
            replace_tensors(model, {id(tensor): new})
            note_replaced(name, tensor, new)
        elif not where.whole:  # a buffer
            replace_tensors(model, {id(tensor): ShardedParameter(where.cut(tensor), where)})
        del tensor


def _carry_hooks(old: Tensor, new: ShardedParameter) -> None:
    """Lets hooks of a parameter run for its sharded self; their handles remove them as before."""
    hooks: Any = old._backward_hooks
    after: Any = old._post_accumulate_grad_hooks

    def run(grad: Tensor) -> Tensor:
        for hook in list(hooks.values()):
            changed = hook(grad)
            grad = grad if changed is None else changed
        return grad

    def run_after(parameter: Tensor) -> None:
        for hook in list(after.values()):
            hook(parameter)

    if hooks:
        new.register_hook(run)
    if after:
        new.register_post_accumulate_grad_hook(run_after)


def _refuse_divided(tensor: Tensor, where: TensorLayout) -> None:
    by = ""
    if isinstance(tensor, ShardedParameter):
        by = "DistributedDataParallel" if tensor.placing.whole and tensor.averaged else ""
    elif isinstance(tensor, DTensor):
        by = "fully_shard"
    if by and not where.whole:
        raise TpCompileError(
            f"a call divides a weight that no call before has used, and that {by} has as it is",
            where=where.name,
            todo=f"capture this call before {by}: give parallelize an example, or use model.capture(...)",
        )


@contextmanager
def unsharded(model: nn.Module, original: type[nn.Module]) -> Iterator[None]:
    """Lends the model its original class and whole plain (valueless) weights, so that it can be captured."""
    sharded_class = model.__class__
    lent: dict[int, Tensor] = {}
    back: dict[int, Tensor] = {}
    for module, attribute in tensors_by_name(model).values():
        held = getattr(module, attribute)
        if isinstance(held, DTensor) or not held.is_leaf:  # a buffer that a call has left a gradient in
            plain = _plain(held, attribute in module._parameters)
            lent[id(held)], back[id(plain)] = plain, held
    replace_tensors(model, lent)
    model.__class__ = original
    try:
        yield
    finally:
        model.__class__ = sharded_class
        replace_tensors(model, back)


def _plain(held: Tensor, parameter: bool) -> Tensor:
    """A plain tensor in the shape of the whole one; a parameter, where there is one."""
    if not isinstance(held, DTensor):
        return held.detach()
    if isinstance(held, ShardedParameter) and held.placing.whole and parameter is held._is_param:
        return held._local_tensor
    whole: Tensor = torch.empty(held.shape, dtype=held.dtype, device="meta")
    return nn.Parameter(whole, held.requires_grad) if parameter else whole


@contextmanager
def local_weights(module: nn.Module) -> Iterator[None]:
    """Lends a module that runs as python plain weights of its own, where these are whole on every rank.

    They stay whole: what was computed with them may be waiting for its gradients.
    """
    table: dict[str, Any] = module._parameters
    held = {
        name: p
        for name, p in table.items()
        if isinstance(p, DTensor) and all(isinstance(at, Replicate) for at in p.placements)
    }
    for p in held.values():
        if isinstance(p, ShardedParameter):
            p.read = True
    dict.update(table, {name: local_tensor(p) for name, p in held.items()})
    try:
        yield
    finally:
        dict.update(table, held)


def sharded_class(original: type[nn.Module], base: type) -> type[nn.Module]:
    """A subclass of the model's class whose forward runs programs; its name and signature are kept."""

    @functools.wraps(original.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._tp.call(self, args, kwargs)

    forward.__signature__ = inspect.signature(original.forward)  # type: ignore[attr-defined]
    body = {"forward": forward, "__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (base, original), body)

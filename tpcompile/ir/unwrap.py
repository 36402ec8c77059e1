"""Quantised weights as the plain tensors that they consist of: packed numbers, scales, zero points.

torchao's quantised weights are tensors of classes of their own, around plain ones. Taken apart, each plain
one is a parameter like any other: it is captured, planned, divided, loaded and saved by its own name, which
is the name that torchao gives to it in checkpoints (``_weight_qdata``). The weight itself is put together
whenever python reads it, so that the module's forward does what it did.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tpcompile.errors import TpCompileError

from . import bitsandbytes_weights, fp8_layers
from .module_tensors import every_name
from .torch_internals import is_traceable_wrapper_subclass

_Parts = dict[int, tuple[Tensor, Tensor]]
"""By its identity a part, which is kept for that, and the parameter that it became."""

_LIBRARIES: tuple[Any, ...] = (bitsandbytes_weights, fp8_layers)
"""What gives a library's layers weights that can be taken apart, and undoes it."""

ORIGINAL = "_tp_whole_class"
"""The attribute of a class by which it says which one it stands for."""

APART = "_tp_apart"
"""The attribute of a module that says how its weights are put together."""


@dataclass(frozen=True)
class Wrapping:
    """How a tensor of a class of its own is put together.

    Attributes:
        kind: its class.
        parts: per attribute that it is made of the parameter or buffer of the module, or how that is put
            together itself.
        context: what the class needs beside them.
        size: its size.
        stride: its strides.
    """

    kind: type[Tensor]
    parts: tuple[tuple[str, str | Wrapping], ...]
    context: Any
    size: torch.Size
    stride: tuple[int, ...]

    def whole(self, module: nn.Module) -> Tensor:
        """The tensor, made of what the module has now."""
        return self.of(functools.partial(getattr, module))

    def of(self, read: Callable[[str], Any]) -> Tensor:
        """The tensor, made of what ``read`` gives for the names of its parts."""
        parts = {
            name: part.of(read) if isinstance(part, Wrapping) else read(part) for name, part in self.parts
        }
        made: Any = self.kind
        whole: Tensor = made.__tensor_unflatten__(parts, self.context, self.size, self.stride)
        return whole

    def leaves(self) -> Iterator[str]:
        """The names of the parameters or buffers that it is made of."""
        for _, part in self.parts:
            if isinstance(part, Wrapping):
                yield from part.leaves()
            else:
                yield part


def is_wrapped(tensor: Any) -> bool:
    """Whether a weight is a tensor of a class of its own that can be taken apart."""
    return is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor)


def taken_apart(model: nn.Module) -> dict[str, list[str]]:
    """Per name of a weight that is taken apart the names of its parts, the largest one first."""
    found: dict[str, list[str]] = {}
    for module, prefix, name, wrapping in wrappings(model, every_name=True):
        parts = sorted(wrapping.leaves(), key=lambda part: -getattr(module, part).numel())
        found[prefix + name] = [prefix + part for part in parts]
    return found


def wholes(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are taken apart, put together."""
    return {prefix + name: wrapping.whole(module) for module, prefix, name, wrapping in wrappings(model)}


def joined(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by name, those that are parts of a weight put together."""
    found = dict(tensors)
    for _, prefix, name, wrapping in wrappings(model):
        if all(prefix + part in found for part in wrapping.leaves()):  # else it is tied to another one
            parts = {part: found.pop(prefix + part) for part in wrapping.leaves()}
            found[prefix + name] = wrapping.of(parts.__getitem__)
    return found


def wrappings(
    model: nn.Module, *, every_name: bool = False
) -> Iterator[tuple[nn.Module, str, str, Wrapping]]:
    """The weights that are taken apart: their module, what its names begin with, their name there."""
    for path, module in model.named_modules(remove_duplicate=not every_name):
        for name, wrapping in module.__dict__.get(APART, {}).items():
            yield module, f"{path}." if path else "", name, wrapping


def unwrapped_copy(model: Any) -> Any:
    """A copy of a model with its quantised weights taken apart, over the same memory; itself, if it has none.

    Raises:
        TpCompileError: one of them is to be trained, or a module has the name of a part already.
    """
    if not _has_wrapped(model):
        return model
    copied = copy.deepcopy(model, {id(tensor): tensor for _, tensor in every_name(model)})
    unwrap(copied)
    return copied


@contextmanager
def put_together_on_error(model: Any) -> Iterator[None]:
    """Puts together what ``unwrap`` has taken apart in the block, if that fails."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    before = {id(module) for module in modules if APART in module.__dict__}
    states = [library.states_of(modules) for library in _LIBRARIES]
    try:
        yield
    except BaseException:
        _wrap_again(module for module in modules if id(module) not in before)
        for library, state in zip(_LIBRARIES, states, strict=True):
            library.give_back(modules, state)
        raise


def unwrap(model: Any) -> None:
    """Takes a model's quantised weights apart, in place.

    Raises:
        TpCompileError: see ``unwrapped_copy``; nothing was changed.
    """
    if not _has_wrapped(model):
        return
    for library in _LIBRARIES:
        library.wrap(model)
    modules = [(path, module) for path, module in model.named_modules() if _tables_of(module)]
    # transformers marks every weight that it loads as one to be trained, if its type looks like a float's.
    marked = getattr(model, "hf_quantizer", None) is not None
    _refuse(modules, marked)
    parts: _Parts = {}
    kinds: list[Any] = [_apart_class_of(module) for _, module in modules]
    for (_, module), kind in zip(modules, kinds, strict=True):
        apart: dict[str, Wrapping] = {}
        for table, names in _tables_of(module):
            order = list(table)
            for name in names:
                parameter = table is module._parameters
                saved = name not in module._non_persistent_buffers_set
                apart[name] = _take_apart(module, f"_{name}", table.pop(name), parts, parameter, saved)
            _reorder(table, [part for n in order for part in (apart[n].leaves() if n in apart else [n])])
        module.__dict__[APART] = module.__dict__.get(APART, {}) | apart
        module.__class__ = kind


def refill(table: Any, tensors: Mapping[str, Any]) -> None:
    """Gives a module's table other tensors, or another order, whatever the module watches."""
    dict.clear(table)
    dict.update(table, tensors)


def _reorder(table: Any, order: Iterable[str]) -> None:
    refill(table, {name: table[name] for name in order})


def _has_wrapped(model: Any) -> bool:
    if not isinstance(model, nn.Module):
        return False
    own = any(is_wrapped(tensor) for _, tensor in every_name(model))
    return own or any(library.concerns(model) for library in _LIBRARIES)


def _tables_of(module: nn.Module) -> list[tuple[dict[str, Any], list[str]]]:
    """The tables of a module in which there are such weights, and the names of these."""
    tables: list[dict[str, Any]] = [module._parameters, module._buffers]
    found = [(table, [name for name, tensor in table.items() if is_wrapped(tensor)]) for table in tables]
    return [(table, names) for table, names in found if names]


def _refuse(modules: list[tuple[str, nn.Module]], marked: bool) -> None:
    for path, module in modules:
        for table, names in _tables_of(module):
            for name in names:
                where, kind = f"{path}.{name}" if path else name, type(table[name]).__name__
                if table[name].requires_grad and not marked:
                    raise TpCompileError(
                        f"a {kind} that is to be trained: how its updates are divided is not known",
                        where=where,
                        todo="freeze it (requires_grad_(False)) and train an adapter, or train before it is "
                        "quantised",
                    )
                if taken := next(
                    (part for part in _part_names(f"_{name}", table[name]) if hasattr(module, part)), None
                ):
                    raise TpCompileError(
                        f"the module has an attribute {taken}, as a part of its {kind} is to be called",
                        where=where,
                        todo="rename the attribute",
                    )


def _part_names(name: str, tensor: Any) -> Iterator[str]:
    """The names that the parts of a tensor get."""
    if not is_wrapped(tensor):
        yield name
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _part_names(f"{name}_{part}", getattr(tensor, part))


def _take_apart(
    module: nn.Module, name: str, tensor: Any, parts: _Parts, parameter: bool, saved: bool
) -> Wrapping:
    """Gives a module the parts of a tensor; one that is tied has the same parts everywhere."""
    names, context = tensor.__tensor_flatten__()
    found: list[tuple[str, str | Wrapping]] = []
    for part in names:
        inner, full = getattr(tensor, part), f"{name}_{part}"
        if is_wrapped(inner):
            found.append((part, _take_apart(module, full, inner, parts, parameter, saved)))
            continue
        if parameter:
            own = nn.Parameter(inner.detach(), requires_grad=False)
            module.register_parameter(full, parts.setdefault(id(inner), (inner, own))[1])  # type: ignore[arg-type]
        else:
            module.register_buffer(full, inner, persistent=saved)
        found.append((part, full))
    return Wrapping(type(tensor), tuple(found), context, tensor.size(), tensor.stride())


def _apart_class_of(module: nn.Module) -> type[nn.Module]:
    kind: Any = type(module)
    return _class_apart(kind, tuple(name for _, names in _tables_of(module) for name in names))


@functools.cache
def _class_apart(original: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """A subclass in which some weights are put together when they are read."""

    def reads(name: str) -> property:
        def read(self: nn.Module) -> Tensor:
            apart: dict[str, Wrapping] = self.__dict__[APART]
            return apart[name].whole(self)

        return property(read)

    body: dict[str, Any] = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    body |= {ORIGINAL: original, **{name: reads(name) for name in names}}
    return type(original.__name__, (original,), body)


def _wrap_again(modules: Iterable[nn.Module]) -> None:
    """Undoes ``unwrap``; nothing was kept for it, so that whole weights are freed while they are divided."""
    made: dict[tuple[int, ...], Any] = {}
    for module in modules:
        apart: dict[str, Wrapping] = module.__dict__.pop(APART, {})
        kind: Any = type(module)
        if apart and ORIGINAL in vars(kind):
            module.__class__ = vars(kind)[ORIGINAL]
        whole_of = {part: name for name, wrapping in apart.items() for part in wrapping.leaves()}
        tables = (module._parameters, module._buffers) if apart else ()
        orders = [dict.fromkeys(whole_of.get(n, n) for n in table) for table in tables]
        for name, wrapping in apart.items():
            parts = list(wrapping.leaves())
            key = tuple(id(getattr(module, part)) for part in parts)
            parameter = parts[0] in module._parameters
            saved = parts[0] not in module._non_persistent_buffers_set
            if key not in made:
                whole = wrapping.whole(module)
                made[key] = nn.Parameter(whole, requires_grad=False) if parameter else whole
            for part in parts:
                delattr(module, part)
            if parameter:
                module.register_parameter(name, made[key])
            else:
                module.register_buffer(name, made[key], persistent=saved)
        for table, order in zip(tables, orders, strict=True):
            _reorder(table, order)

"""Describes a model and a call by everything that the captured graph can depend on.

The description is text: equal text means that capture would give the same graph, in this process or in a
later one. What cannot be described (an object without python source, a hook) raises ``NotCacheable``.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import fractions
import functools
import hashlib
import inspect
import logging
import pathlib
import re
import sys
import types
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils._pytree import TreeSpec

from tpcompile.capture.repeats.layer_fingerprint import weight_owners
from tpcompile.ir.calls import call_key, flatten_call

from .describe_code import CodeDescription, NotCacheable, is_torch, qualified

_BOOKKEEPING = frozenset(nn.Module().__dict__) - {"training"}
# What parallelize and torch.compile leave on a model, neither of which changes its original forward, and a
# hash of transformers' that is another in every process.
_IGNORED = frozenset({"_tp", "_compiled_call_impl", "_original_object_hash"})
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks", "_global_backward_hooks")
_LARGEST_TENSOR = 1 << 20
_DEEPEST = 20
_REPRESENTED = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, re.Pattern, pathlib.PurePath),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size, np.generic, np.dtype),
    *(datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, fractions.Fraction),
    *(types.GenericAlias, types.UnionType, inspect.Signature, type(Ellipsis)),
)
_CONTAINERS = (
    *(dict, list, tuple, set, frozenset, types.MappingProxyType),
    *(collections.OrderedDict, collections.defaultdict, collections.deque),
)
_LEAVES = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


def describe_call(model: nn.Module, bound: dict[str, Any], dynamic: Any, device: torch.device) -> list[Any]:
    """Everything that the capture of a call depends on, as plain data with a stable representation.

    Args:
        model: the model, its modes and torch's modes set as for the capture.
        bound: the call.
        dynamic: which dimensions are to be open.
        device: the device that the graph is made for.

    Raises:
        NotCacheable: something cannot be described.
    """
    leaves, spec = flatten_call(bound)
    description = _Description(model)
    facts = [
        description.model(model),
        _describe_leaves(leaves, spec, model),
        description.value(dynamic),
        _describe_modes(device),
    ]
    return [*facts, description.code.finish()]


def _describe_leaves(leaves: Sequence[Any], spec: TreeSpec, model: nn.Module) -> list[Any]:
    for leaf in leaves:
        if not isinstance(leaf, (torch.Tensor, *_LEAVES)):
            raise NotCacheable(f"an argument is a {type(leaf).__name__}")
    shapes = [tuple(map(int, x.shape)) if isinstance(x, torch.Tensor) else None for x in leaves]
    return [repr(call_key(leaves, spec, model)), shapes]


def _describe_modes(device: torch.device) -> list[str]:
    """The state of torch that traced code can see or that export writes into the graph."""
    kind = device.type
    facts: list[Any] = [
        device,
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
    ]
    facts += [torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)]
    facts += [torch.are_deterministic_algorithms_enabled(), torch.is_autocast_cache_enabled()]
    if kind == "cuda":
        facts += [torch.cuda.get_device_capability(device), torch.version.cuda]
    return [str(fact) for fact in facts]


class _Description:
    """Describes one model; objects that occur again are named by the number of their first occurrence."""

    def __init__(self, model: nn.Module) -> None:
        self.code = CodeDescription(self.value)
        self._modules = {id(module): name for name, module in model.named_modules()}
        self._owners = weight_owners(model)
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []  # an id is only a name for as long as its object lives

    def model(self, model: nn.Module) -> list[Any]:
        """All modules with their attributes, parameters and buffers."""
        if any(getattr(nn_module, name) for name in _GLOBAL_HOOKS):
            raise NotCacheable("there are hooks on all modules")
        return [self._module(name, module) for name, module in model.named_modules(remove_duplicate=False)]

    def _module(self, name: str, module: nn.Module) -> Any:
        if self._modules[id(module)] != name:
            return (name, "is", self._modules[id(module)])
        for hooks in _HOOKS:
            if getattr(module, hooks):
                raise NotCacheable(f"the module {name or 'itself'} has hooks")
        self.code.add_class(type(module))
        attributes = []
        for key, value in sorted(module.__dict__.items()):
            if key not in _BOOKKEEPING and key not in _IGNORED:
                try:
                    attributes.append((key, self.value(value)))
                except NotCacheable as error:
                    raise NotCacheable(f"the attribute {name}.{key}: {error}") from None
        tables = [
            (key, None if tensor is None else self._weight(tensor))
            for table in (module._parameters, module._buffers)
            for key, tensor in table.items()
        ]
        return (name, qualified(type(module)), list(module._modules), attributes, tables)

    def _weight(self, tensor: torch.Tensor) -> Any:
        if type(tensor) not in (torch.Tensor, nn.Parameter, nn.Buffer):
            raise NotCacheable(f"a weight is a {type(tensor).__name__}")
        kind, sizes, steps = type(tensor).__name__, tuple(tensor.shape), tensor.stride()
        names = sorted(self._owners.get(id(tensor), ()))
        return (kind, sizes, steps, str(tensor.dtype), tensor.requires_grad, names[:1], len(names))

    def value(self, value: Any, depth: int = 0) -> Any:
        """Describes any value.

        Raises:
            NotCacheable: it is nothing that is known to be described completely.
        """
        if isinstance(value, enum.Enum):
            return (qualified(type(value)), value.name)
        if isinstance(value, _REPRESENTED) and type(value).__repr__ is not object.__repr__:
            return (type(value).__name__, repr(value))
        if depth > _DEEPEST:
            raise NotCacheable("it is too deep")
        if id(value) in self._modules:
            return ("module", self._modules[id(value)])
        if id(value) in self._owners:
            return ("weight", sorted(self._owners[id(value)]))
        if id(value) in self._numbers:
            return ("again", self._numbers[id(value)])
        self._numbers[id(value)] = len(self._numbers)
        self._alive.append(value)
        return self._composed(value, depth + 1)

    def _composed(self, value: Any, depth: int) -> Any:
        if isinstance(value, torch.Tensor):
            return _tensor(value)
        if isinstance(value, np.ndarray) and value.dtype != object:
            return _tensor(torch.from_numpy(np.ascontiguousarray(value)))
        if isinstance(value, (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType)):
            return self._callable(value, depth)
        if isinstance(value, functools.partial):
            return ("partial", *(self.value(x, depth) for x in (value.func, value.args, value.keywords)))
        if isinstance(value, types.ModuleType):
            return ("python module", value.__name__)
        if isinstance(value, logging.Logger):
            return ("logger", value.name)
        if isinstance(value, weakref.ReferenceType):
            return ("weak", self.value(value(), depth))
        return self._object(value, depth)

    def _callable(self, value: Any, depth: int) -> Any:
        if isinstance(value, type):
            if not is_torch(value):
                self.code.add_class(value)
            return ("class", qualified(value))
        if isinstance(value, types.MethodType):
            return ("method", self.value(value.__self__, depth), self.value(value.__func__, depth))
        if isinstance(value, types.BuiltinFunctionType):
            owner = value.__self__
            if owner is not None and not isinstance(owner, (types.ModuleType, type)):
                return ("method", self.value(owner, depth), value.__qualname__)
            return ("builtin", qualified(value))
        self.code.add_function(value)
        if is_torch(value):
            return ("function", qualified(value))
        defaults = [value.__defaults__, value.__kwdefaults__]
        cells = [_contents(cell) for cell in value.__closure__ or ()]
        return ("function", qualified(value), self.value(defaults, depth), self.value(cells, depth))

    def _object(self, value: Any, depth: int) -> Any:
        """Containers, and objects of python classes: by their items and attributes."""
        kind = type(value)
        _refuse_hidden_state(kind)
        parts = [qualified(kind), *self._items(value, depth)]
        if kind in _CONTAINERS:
            return parts
        if not is_torch(kind):
            self.code.add_class(kind)
        elif not hasattr(value, "__dict__"):
            raise NotCacheable(f"a {qualified(kind)} cannot be described")
        attributes = sorted(_attributes(value).items())
        return [*parts, [(k, self.value(item, depth)) for k, item in attributes if k not in _IGNORED]]

    def _items(self, value: Any, depth: int) -> list[Any]:
        if isinstance(value, (dict, types.MappingProxyType)):
            items = dict.items(value) if isinstance(value, dict) else value.items()
            factory = self.value(getattr(value, "default_factory", None), depth)
            return [factory, *((self.value(k, depth), self.value(v, depth)) for k, v in items)]
        if isinstance(value, (set, frozenset)):
            return sorted(repr(self.value(item, depth)) for item in value)
        if isinstance(value, (list, tuple, collections.deque)):
            return [self.value(item, depth) for item in value]
        return []


def _refuse_hidden_state(kind: type) -> None:
    """Refuses objects that may hold more than their items and attributes, such as iterators and locks."""
    for base in kind.__mro__:
        top = base.__module__.split(".")[0]
        if base is object or base in _CONTAINERS or base is types.SimpleNamespace:
            continue
        if top in sys.stdlib_module_names and top not in ("abc", "typing", "collections", "contextlib"):
            raise NotCacheable(f"a {qualified(kind)} cannot be described")


def _attributes(value: Any) -> dict[str, Any]:
    found = dict(getattr(value, "__dict__", {}))
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot not in ("__dict__", "__weakref__") and hasattr(value, slot):
                found[slot] = getattr(value, slot)
    return found


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _tensor(value: torch.Tensor) -> Any:
    """A tensor outside of the tables of weights: its value goes into the graph."""
    if type(value) not in (torch.Tensor, nn.Parameter) or value.layout != torch.strided:
        raise NotCacheable(f"a {type(value).__name__} cannot be described")
    if value.numel() > _LARGEST_TENSOR:
        raise NotCacheable("a large tensor outside of parameters and buffers")
    facts = (tuple(value.shape), value.stride(), str(value.dtype), str(value.device), value.requires_grad)
    if value.device.type == "meta":
        return ("tensor", facts)
    plain = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return ("tensor", facts, hashlib.sha256(plain.numpy().tobytes()).hexdigest())

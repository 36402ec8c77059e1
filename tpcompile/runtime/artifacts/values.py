"""What stands in a saved program, as JSON: python values, and the structures of calls and results.

Everything that is read back is made by this file's own tables: nothing in a saved program names code to run.
"""

from __future__ import annotations

import collections
import importlib
import math
import re
from collections.abc import Callable
from typing import Any

import torch

from tpcompile.capture.caches.call_results import CacheState, GivenCache
from tpcompile.capture.caches.register import register_cache_support
from tpcompile.errors import TpCompileError
from tpcompile.ir.check import short
from tpcompile.ir.torch_internals import TreeSpec, pytree

_PLAIN = (type(None), bool, int, str)
_KINDS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
_CONTAINERS = {"dict": dict, "list": list, "tuple": tuple, "OrderedDict": collections.OrderedDict}
_NAMES = {kind: name for name, kind in _CONTAINERS.items()}
_RESULTS = re.compile(
    r"transformers\.(modeling_outputs|cache_utils|utils\.generic|models\.\w+\.modeling_\w+)"
)
"""Modules of transformers that have the classes of results."""


def encode(value: Any, refer: Callable[[Any], Any] | None = None) -> Any:
    """A python value as JSON.

    Args:
        value: what is an argument of an operator, or a leaf of a call.
        refer: gives what stands for a value of another type, or None.

    Raises:
        TpCompileError: it is of a type that is not saved.
    """
    if type(value) in _PLAIN:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [encode(value.real), encode(value.imag)]}
    if isinstance(value, list):
        return [encode(each, refer) for each in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(each, refer) for each in value]}
    if isinstance(value, slice):
        return {"slice": [encode(each, refer) for each in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if isinstance(value, GivenCache):
        return {"given": value.argument}
    for name, kind in _KINDS.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    if refer is not None and (found := refer(value)) is not None:
        return found
    raise TpCompileError(
        f"a {type(value).__name__} cannot be saved: {short(value)}",
        where="a call of the model",
        todo="call it with tensors, numbers and text",
    )


def decode(data: Any, device: torch.device, refer: Callable[[str, Any], Any] | None = None) -> Any:
    """What ``encode`` made JSON of.

    Args:
        data: the JSON.
        device: this rank's.
        refer: gives what is meant by a reference: its kind and its value.

    Raises:
        ValueError: it is something else.
    """
    if type(data) in (*_PLAIN, float):
        return data
    if isinstance(data, list):
        return [decode(each, device, refer) for each in data]
    (kind, value), *more = data.items()
    if more:
        raise ValueError(f"{short(data)} is not a value")
    if kind == "tuple":
        return tuple(decode(each, device, refer) for each in value)
    if kind == "slice":
        return slice(*(decode(each, device, refer) for each in value))
    if kind == "float" and value in ("inf", "-inf", "nan"):
        return float(value)
    if kind == "complex":
        return complex(*(decode(each, device) for each in value))
    if kind == "device" and value == device.type:
        return device
    if kind == "device" and value in ("cpu", "meta"):
        return torch.device(value)
    if kind == "given" and isinstance(value, str):
        return GivenCache(value)
    if kind in _KINDS and isinstance(found := getattr(torch, value, None), _KINDS[kind]):
        return found
    if refer is None:
        raise ValueError(f"{short(data)} is not a value")
    return refer(kind, value)


def encode_structure(spec: TreeSpec) -> Any:
    """The structure of a call or a result as JSON.

    Raises:
        TpCompileError: it has a class that is not transformers' and not one of python's containers.
    """
    if spec.is_leaf():
        return None
    kind: Any = spec.type
    name = _NAMES.get(kind)
    if name is None:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if not _RESULTS.fullmatch(kind.__module__):
            raise TpCompileError(
                f"the structure of a {name} cannot be saved: it would take that class to make one",
                where="arguments or result of forward",
                todo="let forward take and return tensors, tuples, lists and dicts, or transformers' outputs",
            )
    return [name, encode(spec.context), [encode_structure(child) for child in spec.children()]]


def decode_structure(data: Any, device: torch.device) -> TreeSpec:
    """What ``encode_structure`` made JSON of.

    Raises:
        ValueError: it is something else, or has a class that there is not.
    """
    if data is None:
        return pytree.treespec_leaf()
    name, context, children = data
    kind = _CONTAINERS.get(name) or _library_class(name)
    parts = [decode_structure(child, device) for child in children]
    return TreeSpec(kind, decode(context, device), parts)


def _library_class(name: str) -> Any:
    """A class of transformers' that stands in results."""
    module, _, attribute = name.rpartition(".")
    if not _RESULTS.fullmatch(module):
        raise ValueError(f"{name} is not a class of results")
    found = getattr(importlib.import_module(module), attribute, None)
    register_cache_support()
    if not isinstance(found, type) or found not in pytree.SUPPORTED_NODES:
        raise ValueError(f"{name} is not a class of results")
    return found


def encode_state(state: CacheState) -> Any:
    """How the state of a cache is made of tensors, as JSON."""
    return encode((state.argument, state.layers, state.part, state.flags))


def decode_state(data: Any, device: torch.device) -> CacheState:
    """What ``encode_state`` made JSON of."""
    return CacheState(*decode(data, device))

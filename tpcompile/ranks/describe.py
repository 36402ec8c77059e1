"""Values and code of the user's as text, equal on ranks that were given the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from tpcompile.ir.nodes import has_fractions

from .digest import digest

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


def describe_value(value: Any, floats: bool = True) -> str:
    """A value as text.

    Args:
        value: tensors are told by type, shape and contents, configurations by what they hold, objects of
            unknown classes by these.
        floats: whether the contents of floating point tensors count.
    """
    if isinstance(value, Tensor):
        shape = "nested" if value.is_nested else list(value.shape)
        facts = f"{value.dtype} {shape}{' with gradient' if value.requires_grad else ''}"
        exact = floats or not has_fractions(value)
        return f"{facts} {digest(value)}" if exact else facts
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} [{', '.join(describe_value(v, floats) for v in value)}]"
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__} {sorted(describe_value(v, floats) for v in value)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} {[f'{k!r}: {describe_value(v, floats)}' for k, v in value.items()]}"
    if hasattr(value, "to_json_string"):  # a configuration, which may hold tensors
        public = sorted((key, v) for key, v in vars(value).items() if not key.startswith("_"))
        return str([(key, describe_value(v, floats)) for key, v in public])
    if is_dataclass(value) and not isinstance(value, type):
        held = [f"{f.name}={describe_value(getattr(value, f.name), floats)}" for f in fields(value)]
        return f"{type(value).__name__}({', '.join(held)})"
    return getattr(value, "__qualname__", type(value).__qualname__)


def describe_code(code: Any) -> str:
    """A function or class of the user's: its name, and a fingerprint of what its own code does."""
    kinds = code.__mro__ if isinstance(code, type) else ()
    own = [v for kind in kinds if not _is_library(kind) for _, v in sorted(vars(kind).items())]
    functions = own or [code]
    words = [w for f in functions if (c := getattr(f, "__code__", None)) is not None for w in _words(c)]
    return f"{code.__qualname__} {hashlib.sha256(' '.join(words).encode()).hexdigest()[:16]}"


def _is_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("builtins", "torch", "abc", "tpcompile")


def _words(code: CodeType) -> Iterator[str]:
    """What a function does, without where it stands: its file and lines may differ."""
    yield code.co_code.hex()
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words(constant)
        else:
            yield describe_value(constant)

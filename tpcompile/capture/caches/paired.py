"""Takes the cache of an encoder-decoder apart: a cache of its own tokens, one of the encoder's states.

Whether a layer's half for the encoder's states is filled is a python flag that the model branches on. Flags
are leaves, so that they select the program like any python argument.
"""

from __future__ import annotations

from typing import Any

from tpcompile.ir.torch_internals import pytree

from .form import register_pytree

PAIR = ("self_attention_cache", "cross_attention_cache")
FLAGS = "is_updated"
_KEYS = ("self", "cross", "updated")


def is_paired(cache: Any) -> bool:
    """Whether a cache is a pair of caches."""
    return all(hasattr(cache, name) for name in (*PAIR, FLAGS))


def is_cross(name: str) -> bool:
    """Whether a leaf of this name belongs to the half for the encoder's states."""
    return f"['{_KEYS[1]}']" in name


def register_paired_cache(kind: Any) -> None:
    """Registers ``EncoderDecoderCache`` as a pytree of its caches and its flags."""

    def unflatten(values: Any, context: tuple[int, ...]) -> Any:
        own, cross, flags = values
        cache = kind.__new__(kind)
        cache.self_attention_cache, cache.cross_attention_cache = own, cross
        cache.is_updated = dict(zip(context, flags, strict=True))
        return cache

    register_pytree(kind, _flatten, unflatten, _flatten_with_keys)


def _flatten(cache: Any) -> tuple[list[Any], tuple[int, ...]]:
    flags = getattr(cache, FLAGS)
    return [*(getattr(cache, name) for name in PAIR), list(flags.values())], tuple(flags)


def _flatten_with_keys(cache: Any) -> tuple[list[tuple[Any, Any]], tuple[int, ...]]:
    values, context = _flatten(cache)
    return [(pytree.MappingKey(key), value) for key, value in zip(_KEYS, values, strict=True)], context

"""Teaches pytree to take transformers' caches apart without losing any of their state."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tpcompile.errors import TpCompileError
from tpcompile.ir.torch_internals import pytree

from .form import LayerFacts, Parts, register_pytree
from .layers import make_layer, take_layer
from .paged import PagedCache
from .paired import register_paired_cache

_Context = tuple[tuple[str, LayerFacts], ...]
_CACHES = ("DynamicCache", "StaticCache")


def register_cache_support() -> None:
    """Registers the caches as pytrees, a dict of tensors per layer; nothing happens without transformers.

    transformers' own registration (``register_dynamic_cache_export_support``) drops how many tokens a
    sliding-window layer has seen, so that positions go silently wrong once the window is full. Ours
    replaces it.
    """
    if "transformers" not in sys.modules:
        return
    try:
        from transformers import cache_utils
    except ImportError:
        return
    for name in _CACHES:
        kind = getattr(cache_utils, name)
        register_pytree(
            kind,
            _flatten,
            lambda parts, context, kind=kind: _make_cache(kind, parts, context),
            _flatten_with_keys,
        )
    register_paired_cache(cache_utils.EncoderDecoderCache)
    register_pytree(PagedCache, _flatten_layers, _make_paged, _flatten_with_keys)


def _flatten(cache: Any) -> tuple[list[Parts], _Context]:
    if cache.offloading:
        raise TpCompileError(
            "a cache that is offloaded cannot be captured",
            where="past_key_values",
            todo="do not offload the cache",
        )
    if (kind := cache.layer_class_to_replicate) is not None and kind.__name__ != "DynamicLayer":
        raise TpCompileError(
            f"a cache that makes layers of the class {kind.__name__} cannot be captured",
            where="past_key_values",
            todo="give it layers when it is made, as DynamicCache(config=...) does",
        )
    return _flatten_layers(cache)


def _flatten_layers(cache: Any) -> tuple[list[Parts], _Context]:
    taken = [take_layer(layer) for layer in cache.layers]
    return [parts for parts, _ in taken], tuple(context for _, context in taken)


def _flatten_with_keys(cache: Any) -> tuple[list[tuple[Any, Any]], _Context]:
    layers, context = _flatten_layers(cache)
    return [(pytree.SequenceKey(i), parts) for i, parts in enumerate(layers)], context


def _make_cache(kind: Any, layers: Sequence[Parts], context: _Context) -> Any:
    from transformers.cache_utils import Cache, DynamicLayer

    cache = kind.__new__(kind)
    if not context:
        Cache.__init__(cache, layer_class_to_replicate=DynamicLayer)
    else:
        Cache.__init__(cache, layers=_make_layers(layers, context))
    return cache


def _make_paged(layers: Sequence[Parts], context: _Context) -> PagedCache:
    return PagedCache(_make_layers(layers, context))


def _make_layers(layers: Sequence[Parts], context: _Context) -> list[Any]:
    return [make_layer(parts, facts) for parts, facts in zip(layers, context, strict=True)]


def is_cache(value: Any) -> bool:
    """Whether a value is a cache that can be taken apart."""
    kind = type(value)
    named = any(base.__name__ in ("Cache", "PagedCache") for base in kind.__mro__)
    return named and kind in pytree.SUPPORTED_NODES

"""Teaches pytree to take transformers' DynamicCache apart without losing any of its state."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tpcompile.errors import TpCompileError

SEEN = "seen_tokens"
"""Name of the leaves that carry a sliding layer's token count, as the length of a tensor without elements."""

_Context = tuple[tuple[int | None, bool], ...]


def register_cache_support() -> None:
    """Register DynamicCache as a pytree; nothing happens without transformers.

    transformers' own registration (``register_dynamic_cache_export_support``) drops how many tokens a
    sliding-window layer has seen, so that positions go silently wrong once the window is full. Ours
    replaces it: the count travels as the SIZE of an empty tensor, hence as a symbol and not as a constant.
    """
    if "transformers" not in sys.modules:
        return
    try:
        from transformers.cache_utils import DynamicCache
    except ImportError:
        return
    known = pytree.SUPPORTED_NODES.get(DynamicCache)
    if known is not None and known.flatten_fn is _flatten:
        return
    if known is not None:
        pytree._deregister_pytree_node(DynamicCache)
    pytree.register_pytree_node(
        DynamicCache,
        _flatten,
        _unflatten,
        serialized_type_name=f"{DynamicCache.__module__}.{DynamicCache.__name__}",
        flatten_with_keys_fn=_flatten_with_keys,
    )


def _parts(cache: Any) -> tuple[dict[str, list[torch.Tensor]], _Context]:
    """Return the tensors by role, and for each layer its window (None: unlimited) and whether it has data."""
    parts: dict[str, list[torch.Tensor]] = {"key_cache": [], "value_cache": []}
    context = []
    for layer in cache.layers:
        kind = type(layer).__name__
        if kind not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
            raise TpCompileError(f"a cache with a {kind} cannot be captured", todo="pass use_cache=False")
        window = layer.sliding_window if kind == "DynamicSlidingWindowLayer" else None
        has_data = layer.keys is not None
        context.append((window, has_data))
        if not has_data:
            continue
        parts["key_cache"].append(layer.keys)
        parts["value_cache"].append(layer.values)
        if window is not None:
            seen = layer.keys.new_empty((layer.cumulative_length, 0))
            parts.setdefault(SEEN, []).append(seen)
    return parts, tuple(context)


def _flatten(cache: Any) -> tuple[list[Any], _Context]:
    parts, context = _parts(cache)
    return list(parts.values()), context


def _flatten_with_keys(cache: Any) -> tuple[list[tuple[Any, Any]], _Context]:
    parts, context = _parts(cache)
    return [(pytree.MappingKey(key), value) for key, value in parts.items()], context


def _unflatten(values: Any, context: _Context) -> Any:
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    roles = [list(role) for role in values]
    layers: list[Any] = []
    for window, has_data in context:
        layer = DynamicLayer() if window is None else DynamicSlidingWindowLayer(sliding_window=window)
        if has_data:
            keys, data = roles[0].pop(0), roles[1].pop(0)
            layer.lazy_initialization(keys, data)
            layer.keys, layer.values = keys, data
            if window is not None:
                layer.cumulative_length = roles[2].pop(0).shape[0]
        layers.append(layer)
    cache = DynamicCache()
    if layers:
        cache.layers = layers
        cache.layer_class_to_replicate = None
    return cache
